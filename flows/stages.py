"""A stage: a function of folders and plain values to one new folder, run once for each different input.

The folder's name holds the digest of everything that decides its content: the inputs' digests, the options, our own
code and the packages that do the work. It is written beside its place and renamed into it, so a folder that exists is
complete: that is the cache and the crash recovery at once.
"""

import hashlib
import inspect
import json
import logging
import os
import platform
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Concatenate, Generic, Literal, ParamSpec, TypeVar, get_type_hints

from pydantic import BaseModel, TypeAdapter, ValidationError

import numprune
from numprune.errors import IntegrityError
from numprune.export import locks, manifest
from numprune.flows import runs

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

RESULT = "result.json"  # in a stage's folder: what its body returned
_ROOT = Path(numprune.__file__).parent
_LINKED = ("export", "serving", "flows")  # in _ROOT, beside the core
Layer = Literal["numprune", "export", "serving", "studies"]
# Where each layer's code is, beside the core's; a layer's stages use the layers before it, too. `flows/steps` holds the
# bodies of the stages. Studies are a layer of their own, so that an edit there leaves production stages valid.
_FOLDERS: dict[Layer, tuple[str, ...]] = {
    "numprune": ("flows/steps",),
    "export": ("export",),
    "serving": ("serving",),
    "studies": ("flows/studies",),
}
# What does the work beside our own code: another version of one of them makes another stage.
_PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "scipy",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "tensorrt",
    "accelerate",
    "peft",
)


@dataclass(frozen=True)
class Artifact:
    """A folder that a stage reads, and the digest of its content, which stands for it in the stage's key."""

    path: Path
    digest: str


@dataclass(frozen=True)
class Text:
    """A recipe's text: its files or "embedded", and the digest of its content, which stands for it in a stage's key."""

    source: str | list[str]
    digest: str


@dataclass(frozen=True)
class Stage(Generic[R]):
    """What is asked for: see `of`.

    Attributes:
        name: of the folder, before the digest.
        layer: the highest package whose code `body` calls; a change in it or below makes another stage.
        arguments: of the body. They and the code decide the content, and nothing else may.
        label: what it is called in logs and tables.
        uses_gpu: where the run has a GPU; of such stages one at a time is made.
    """

    name: str
    layer: Layer
    body: Callable[..., R]
    arguments: Mapping[str, Any]
    label: str
    uses_gpu: bool = False

    @staticmethod
    def of(
        name: str, layer: Layer, body: Callable[Concatenate[Path, P], R], /, *args: P.args, **kwargs: P.kwargs
    ) -> "Stage[R]":
        """Return the stage that `body` makes of these arguments.

        Args:
            body: writes into the empty folder that it is given, and returns what it found: a dataclass, a pydantic
                model or plain JSON.
            args, kwargs: artifacts, texts, sections of a recipe, plain values.
        """
        _, *arguments = inspect.signature(body).bind(Path(), *args, **kwargs).arguments.items()
        return Stage(name, layer, body, dict(arguments), name)

    def labelled(self, label: str) -> "Stage[R]":
        return replace(self, label=label)

    def on_gpu(self) -> "Stage[R]":
        return replace(self, uses_gpu=True)


@dataclass(frozen=True)
class StageResult(Generic[R]):
    """A finished stage.

    Attributes:
        name: its label.
        path: its folder, written or verified just now.
        digest: of its manifest; a later stage that reads it names this as its input.
        facts: what its body returned.
        reused: it was there already.
        seconds: that the call took, waiting for another run included.
        peak_memory_bytes: highest resident size of the process that ran it, or of one that this started: a
            benchmark's workers.
        bytes: of its files.
    """

    name: str
    path: Path
    digest: str
    facts: R
    reused: bool
    seconds: float
    peak_memory_bytes: int
    bytes: int

    @property
    def artifact(self) -> Artifact:
        return Artifact(self.path, self.digest)


def workspace_folder(asked: str | None) -> Path:
    """The folder of stages, releases and registry: the one asked for, $NUMPRUNE_WORKSPACE, or `numprune-workspace`."""
    return Path(asked or os.environ.get("NUMPRUNE_WORKSPACE") or "numprune-workspace").expanduser().absolute()


def run_stage(workspace: Path, stage: Stage[R], used_by: Path | None = None) -> StageResult[R]:
    """Return the stage, made by its body unless it is there.

    Of several processes that ask for the same stage one makes it and the others wait for it. A folder that is not what
    its manifest says is removed, with a warning, and made again: it can be, from the inputs, and is never used.

    Args:
        used_by: the folder of the run that asks (see runs.py), for whose sake `numprune runs clean` leaves it.
    """
    started = time.perf_counter()
    key, inputs = _key(stage)
    place = _place(workspace, stage, key)
    with exclusive(place.path):
        runs.mark(used_by, place.path)
        reused = place.path.exists() and is_whole(place.path, place.digest)
        if not reused:
            facts = {**key, "key": place.digest}
            with manifest.creating(place.path, kind="stage", parents=inputs, facts=facts) as content:
                found = _adapter(stage).dump_python(stage.body(content, **stage.arguments), mode="json")
                text = json.dumps(found, indent=1, sort_keys=True, allow_nan=False)
                (content / RESULT).write_text(text + "\n", encoding="utf-8")
        made = _read(place.path, stage)
    seconds = time.perf_counter() - started
    return replace(made, reused=reused, seconds=seconds, peak_memory_bytes=peak_memory_bytes())


def find(workspace: Path, stage: Stage[R]) -> StageResult[R] | None:
    """Return the stage that `run_stage` would reuse, but for its files, which are not verified; None without one."""
    folder = place_of(workspace, stage).path
    try:
        return _read(folder, stage) if folder.exists() else None
    except (IntegrityError, FileNotFoundError, ValidationError):  # damaged
        return None


def place_of(workspace: Path, stage: Stage[R]) -> Artifact:
    """Return where the stage is or will be, and the digest of all that decides its content: it need not be made."""
    return _place(workspace, stage, _key(stage)[0])


def read_facts(folder: Path, kind: type[R]) -> R:
    """Read what the body of the stage in `folder` returned, which is of this kind."""
    return TypeAdapter(kind).validate_json((folder / RESULT).read_bytes())


def _read(folder: Path, stage: Stage[R]) -> StageResult[R]:
    found = manifest.read(folder)
    size = sum(entry.size for entry in found.files.values())
    facts = _adapter(stage).validate_json((folder / RESULT).read_bytes())
    return StageResult(stage.label, folder, found.digest, facts, True, 0.0, 0, size)


def _adapter(stage: Stage[R]) -> TypeAdapter[R]:
    return TypeAdapter(get_type_hints(stage.body).get("return", Any))


def _place(workspace: Path, stage: Stage[R], key: Mapping[str, Any]) -> Artifact:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True, allow_nan=False).encode()).hexdigest()
    return Artifact(workspace / "stages" / f"{stage.name}-{digest[:16]}", digest)


def _key(stage: Stage[R]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return all that decides a stage's content, and the digests of its inputs by their names."""
    inputs: dict[str, str] = {}
    arguments = {name: _plain(name, value, inputs) for name, value in stage.arguments.items()}
    return {"name": stage.name, "arguments": arguments, "code": {**code_version(stage.layer)}}, inputs


def _plain(name: str, value: object, inputs: dict[str, str]) -> Any:
    """Return what stands for an argument in a key; digests are noted in `inputs`."""
    if isinstance(value, Artifact | Text):
        inputs[name] = value.digest
        return value.digest
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(f"{name}.{key}", item, inputs) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(f"{name}.{number}", item, inputs) for number, item in enumerate(value, start=1)]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    kind = type(value).__name__
    raise TypeError(f"{name}: a stage cannot be known by a {kind}; give an Artifact, a Text or plain values")


def discard(result: StageResult[Any]) -> None:
    """Forget a stage: the next run makes it again. What another run has made there meanwhile stays."""
    with exclusive(result.path):
        if result.path.exists() and manifest.read(result.path).digest == result.digest:
            shutil.rmtree(result.path)


def kept_beside(content: Path) -> Path:
    """Return the folder in which the body that writes into `content` may leave what it resumes from if it is killed."""
    return content.parents[1]


def sweep(workspace: Path) -> None:
    """Remove what killed runs left half made."""
    for folder in ("stages", "releases", runs.FOLDER):
        for path in manifest.sweep(workspace / folder):
            logger.info("%s: half made by a run that was killed; removed", path)


def peak_memory_bytes() -> int:
    """The highest resident size so far of this process, or of one that it started and that has ended."""
    unit = 1 if sys.platform == "darwin" else 1024
    return max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) * unit


@cache
def code_version(layer: Layer) -> dict[str, str]:
    """What a stage of `layer` is made with: a digest of our source files up to that layer, and versions."""
    digest = hashlib.sha256()
    for path in sources(layer):
        digest.update(path.as_posix().encode() + b"\0" + hashlib.sha256((_ROOT / path).read_bytes()).digest())
    versions = {"python": platform.python_version(), "sources": digest.hexdigest()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue  # an extra that is not installed
    return versions


def sources(layer: Layer) -> list[Path]:
    """Our source files up to `layer`, and the bodies of the stages; relative to the package."""
    layers = list(_FOLDERS)
    folders = [folder for name in layers[: layers.index(layer) + 1] for folder in _FOLDERS[name]]
    files = [path for path in _ROOT.rglob("*.py") if path.relative_to(_ROOT).parts[0] not in _LINKED]
    files += [path for folder in folders for path in (_ROOT / folder).rglob("*.py")]
    return sorted(path.relative_to(_ROOT) for path in files)


def is_whole(folder: Path, key: str) -> bool:
    """Whether the folder is what its manifest says, and is the stage of `key`; it is removed when not."""
    try:
        if manifest.verify(folder).facts.get("key") == key:
            return True
        reason = "it was made from something else"
    except IntegrityError as error:
        reason = str(error)
    logger.warning("stage %s is damaged (%s): removed, and made again", folder.name, reason)
    shutil.rmtree(folder)
    return False


@contextmanager
def exclusive(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock of a stage; the kernel lets it go when the process ends, however it ends.

    Raises locks.Held when another process holds it and there shall be no waiting.
    """
    path = folder.parent / ".locks" / folder.name
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = locks.open_file(path)
    try:
        try:
            locks.acquire(handle, path, wait=False)
        except locks.Held:
            if not wait:
                raise
            logger.info("%s: another run is making it; waiting", folder.name)
            locks.acquire(handle, path)
        yield
    finally:
        os.close(handle)
