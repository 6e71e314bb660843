"""A stage: a function of folders and plain values to one new folder, run once for each distinct input.

The folder's name contains the digest of everything that affects its content: the inputs' digests, the options,
numprune's code and the packages that do the work. It is written to a temporary name and then renamed, so an existing
folder is complete: that is both the cache and the crash recovery.
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
R_co = TypeVar("R_co", covariant=True)

RESULT = "result.json"  # the body's result, in the stage's folder
_ROOT = Path(numprune.__file__).parent
_LINKED = ("export", "serving", "flows")  # in _ROOT, beside the core
Layer = Literal["export", "serving", "studies"]
# The code of each layer besides the core, as folders and files; a layer's stages also use the layers before it.
# `flows/steps` has the bodies of the stages; the other modules of `flows` that they use are listed. Studies are a layer
# of their own, so that an edit there leaves production stages valid.
_CODE: dict[Layer, tuple[str, ...]] = {
    "export": ("export", "flows/steps", "flows/amounts.py", "flows/names.py", "flows/sections.py", "flows/values.py"),
    "serving": ("serving",),
    "studies": ("flows/studies",),
}
# Packages that do the work: another version of one of them gives another stage.
_PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "scipy",
    "pillow",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "tensorrt",
    "accelerate",
    "peft",
    "lm_eval",
)


@dataclass(frozen=True)
class Artifact:
    """A folder that a stage reads; its content digest represents it in the stage's key."""

    path: Path
    digest: str


@dataclass(frozen=True)
class Text:
    """A recipe's text or tasks: files, names or "embedded"; their content digest represents them in a stage's key."""

    source: str | list[str]
    digest: str


@dataclass(frozen=True)
class Stage(Generic[R]):
    """A requested stage: see `of`.

    Attributes:
        name: of the folder, before the digest.
        layer: the highest package whose code `body` calls; a change in it or below gives another stage.
        arguments: of the body. They and the code determine the content, and nothing else may.
        label: its name in logs and tables.
        uses_gpu: whether it uses the run's GPU; such stages run one at a time.
        measures_time: whether it measures time, which other work on the machine would change.
    """

    name: str
    layer: Layer
    body: Callable[..., R]
    arguments: Mapping[str, Any]
    label: str
    uses_gpu: bool = False
    measures_time: bool = False

    @staticmethod
    def of(
        name: str, layer: Layer, body: Callable[Concatenate[Path, P], R], /, *args: P.args, **kwargs: P.kwargs
    ) -> "Stage[R]":
        """Return the stage that calls `body` with these arguments.

        Args:
            body: writes to the empty folder that it is given, and returns its result: a dataclass, a pydantic model or
                plain JSON.
            args, kwargs: artifacts, texts, sections of a recipe, plain values.
        """
        _, *arguments = inspect.signature(body).bind(Path(), *args, **kwargs).arguments.items()
        return Stage(name, layer, body, dict(arguments), name)

    def labelled(self, label: str) -> "Stage[R]":
        return replace(self, label=label)

    def on_gpu(self) -> "Stage[R]":
        return replace(self, uses_gpu=True)

    def timed(self) -> "Stage[R]":
        return replace(self, measures_time=True)


@dataclass(frozen=True)
class StageResult(Generic[R_co]):
    """A finished stage.

    Attributes:
        name: its label.
        path: its folder, just written or verified.
        digest: of its manifest; later stages that read it use this as their input's digest.
        facts: the body's result.
        reused: whether it already existed.
        seconds: duration of the call, including waiting for another run.
        peak_memory_bytes: peak resident size of its process or of a child, such as a benchmark worker.
        bytes: of its files.
    """

    name: str
    path: Path
    digest: str
    facts: R_co
    reused: bool
    seconds: float
    peak_memory_bytes: int
    bytes: int

    @property
    def artifact(self) -> Artifact:
        return Artifact(self.path, self.digest)


def workspace_folder(asked: str | None) -> Path:
    """The folder of stages, releases and registry: the requested one, $NUMPRUNE_WORKSPACE, or `numprune-workspace`."""
    return Path(asked or os.environ.get("NUMPRUNE_WORKSPACE") or "numprune-workspace").expanduser().absolute()


def run_stage(workspace: Path, stage: Stage[R], used_by: Path | None = None) -> StageResult[R]:
    """Return the stage, computed by its body if missing.

    If several processes request the same stage, one computes it and the others wait. A folder that contradicts its
    manifest is never used: it is removed with a warning and recomputed from the inputs.

    Args:
        used_by: the folder of the requesting run (see runs.py), for which `numprune runs clean` keeps the stage.
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
    """Return the stage's folder, whether or not it exists, and the digest of everything that affects its content."""
    return _place(workspace, stage, _key(stage)[0])


def read_facts(folder: Path, kind: type[R]) -> R:
    """Read the body's result, of this kind, from the stage in `folder`."""
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
    """Return everything that affects a stage's content, and the digests of its inputs by name."""
    inputs: dict[str, str] = {}
    arguments = {name: _plain(name, value, inputs) for name, value in stage.arguments.items()}
    return {"name": stage.name, "arguments": arguments, "code": {**code_version(stage.layer)}}, inputs


def _plain(name: str, value: object, inputs: dict[str, str]) -> Any:
    """Return the representation of an argument in a key; digests are recorded in `inputs`."""
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
    raise TypeError(f"{name}: a {kind} cannot be part of a stage's key; give an Artifact, a Text or plain values")


def discard(result: StageResult[Any]) -> None:
    """Discard a stage, so that the next run recomputes it; one that another run has recomputed meanwhile is kept."""
    with exclusive(result.path):
        if result.path.exists() and manifest.read(result.path).digest == result.digest:
            shutil.rmtree(result.path)


def kept_beside(content: Path) -> Path:
    """Return the folder in which the body that writes into `content` may save state to resume from if it is killed."""
    return content.parents[1]


def sweep(workspace: Path) -> None:
    """Remove unfinished folders of killed runs."""
    for folder in ("stages", "releases", runs.FOLDER):
        for path in manifest.sweep(workspace / folder):
            logger.info("%s: left unfinished by a killed run; removed", path)


def peak_memory_bytes() -> int:
    """The peak resident size of this process or of any ended child."""
    unit = 1 if sys.platform == "darwin" else 1024
    return max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) * unit


@cache
def code_version(layer: Layer) -> dict[str, str]:
    """The code version of a stage of `layer`: a digest of our source files up to that layer, and package versions."""
    digest = hashlib.sha256()
    for path in sources(layer):
        digest.update(path.as_posix().encode() + b"\0" + hashlib.sha256((_ROOT / path).read_bytes()).digest())
    versions = {"python": platform.python_version(), "sources": digest.hexdigest()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue  # a missing extra
    return versions


def sources(layer: Layer) -> list[Path]:
    """numprune's source files up to `layer`, and the stages' bodies, relative to the package."""
    layers = list(_CODE)
    code = [_ROOT / place for name in layers[: layers.index(layer) + 1] for place in _CODE[name]]
    files = [path for path in _ROOT.rglob("*.py") if path.relative_to(_ROOT).parts[0] not in _LINKED]
    files += [path for place in code for path in (place.rglob("*.py") if place.is_dir() else [place])]
    return sorted(path.relative_to(_ROOT) for path in files)


def is_whole(folder: Path, key: str) -> bool:
    """Whether the folder matches its manifest and `key`; it is removed if not."""
    try:
        if manifest.verify(folder).facts.get("key") == key:
            return True
        reason = "it was computed from other inputs"
    except IntegrityError as error:
        reason = str(error)
    logger.warning("stage %s is damaged (%s): removed, will be recomputed", folder.name, reason)
    shutil.rmtree(folder)
    return False


@contextmanager
def exclusive(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock of a stage, which the kernel releases when the process ends for any reason.

    Raises locks.Held if another process holds it and waiting is off.
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
            logger.info("%s: another run is computing it; waiting", folder.name)
            locks.acquire(handle, path)
        yield
    finally:
        os.close(handle)
