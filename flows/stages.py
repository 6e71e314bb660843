"""A stage: a function of folders and plain values to one new folder, run once for each different input.

The folder's name holds the digest of everything that decides its content: the inputs' digests, the options, our own
code and the packages that do the work. It is written beside its place and renamed into it, so a folder that exists is
complete: that is the cache and the crash recovery at once.
"""

import hashlib
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
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numprune
from numprune.errors import IntegrityError
from numprune.export import locks, manifest
from numprune.flows import runs

logger = logging.getLogger(__name__)

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
)


@dataclass(frozen=True)
class StageResult:
    """A finished stage.

    Attributes:
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
    facts: dict[str, Any]
    reused: bool
    seconds: float
    peak_memory_bytes: int
    bytes: int


def workspace_folder(asked: str | None) -> Path:
    """The folder of stages, releases and registry: the one asked for, $NUMPRUNE_WORKSPACE, or `numprune-workspace`."""
    return Path(asked or os.environ.get("NUMPRUNE_WORKSPACE") or "numprune-workspace").expanduser().absolute()


def run_stage(
    workspace: Path,
    name: str,
    inputs: Mapping[str, str],
    options: Mapping[str, Any],
    body: Callable[[Path], dict[str, Any]],
    layer: Layer = "serving",
    used_by: Path | None = None,
) -> StageResult:
    """Return the stage of these inputs and options, made by `body` unless it is there.

    Of several processes that ask for the same stage one makes it and the others wait for it. A folder that is not what
    its manifest says is removed, with a warning, and made again: it can be, from the inputs, and is never used.

    Args:
        inputs: role -> SHA-256 digest of everything that `body` reads.
        options: every plain value that `body` uses.
        body: writes into the empty folder that it is given, and returns facts about it.
        layer: the highest package whose code `body` calls; a change in it or below makes another stage.
        used_by: the folder of the run that asks (see runs.py), for whose sake `numprune runs clean` leaves it.
    """
    started = time.perf_counter()
    key = _key(name, inputs, options, layer)
    digest = _digest(key)
    folder = _folder(workspace, name, digest)
    with exclusive(folder):
        runs.mark(used_by, folder)
        reused = folder.exists() and is_whole(folder, digest)
        if not reused:
            with manifest.creating(folder, kind="stage", parents=inputs, facts={**key, "key": digest}) as content:
                text = json.dumps(body(content), indent=1, sort_keys=True, allow_nan=False)
                (content / RESULT).write_text(text + "\n", encoding="utf-8")
        found = manifest.read(folder)
        facts = read_facts(folder)
    seconds, size = time.perf_counter() - started, sum(entry.size for entry in found.files.values())
    return StageResult(name, folder, found.digest, facts, reused, seconds, peak_memory_bytes(), size)


def is_made(
    workspace: Path, name: str, inputs: Mapping[str, str], options: Mapping[str, Any], layer: Layer = "serving"
) -> bool:
    """Whether `run_stage` would find this stage."""
    return find(workspace, name, inputs, options, layer) is not None


def find(
    workspace: Path, name: str, inputs: Mapping[str, str], options: Mapping[str, Any], layer: Layer
) -> StageResult | None:
    """Return the stage that `run_stage` would reuse, its files not verified; None where it would make it."""
    folder = _folder(workspace, name, _digest(_key(name, inputs, options, layer)))
    if not folder.exists():
        return None
    found = manifest.read(folder)
    size = sum(entry.size for entry in found.files.values())
    return StageResult(name, folder, found.digest, read_facts(folder), True, 0.0, 0, size)


def _key(name: str, inputs: Mapping[str, str], options: Mapping[str, Any], layer: Layer) -> dict[str, Any]:
    return {"name": name, "inputs": {**inputs}, "options": {**options}, "code": {**code_version(layer)}}


def _digest(key: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _folder(workspace: Path, name: str, digest: str) -> Path:
    return workspace / "stages" / f"{name}-{digest[:16]}"


def read_facts(folder: Path) -> dict[str, Any]:
    """What the body of the stage in `folder` returned."""
    facts: dict[str, Any] = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    return facts


def discard(result: StageResult) -> None:
    """Forget a stage: the next run makes it again. What another run has made there meanwhile stays."""
    with exclusive(result.path):
        if result.path.exists() and manifest.read(result.path).digest == result.digest:
            shutil.rmtree(result.path)


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
