"""Find and delete unused workspace data.

Data used by a recorded run is kept, and so is everything in the registry. Deletion is atomic: a folder is renamed
first, so leftovers of a killed clean are never taken for a stage. Links are not followed.
"""

import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cache, partial
from pathlib import Path
from typing import Literal

from numprune.errors import InputError, NumpruneError
from numprune.export import locks, manifest, temporary
from numprune.flows import recipe, runs
from numprune.flows.names import TIMINGS, TRAINING, TRAINING_LOCK
from numprune.flows.stages import exclusive

logger = logging.getLogger(__name__)

Kind = Literal["run", "stage", "release", "training", "temporary"]

_STAGES, _RELEASES = "stages", "releases"
_MADE = re.compile(r"[A-Za-z0-9][\w.-]*-[0-9a-f]{16}")  # the folder of a stage or a release


@dataclass(frozen=True)
class Item:
    """A folder, the `bytes` of its files, and why it can be removed, or is kept although no run uses it."""

    kind: Kind
    path: Path
    bytes: int
    why: str


@dataclass(frozen=True)
class Found:
    """`used`: folder of the workspace -> bytes of its files; `goes`: removable; `stays`: unused but kept."""

    used: dict[str, int]
    goes: list[Item] = field(default_factory=list)
    stays: list[Item] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        return sum(item.bytes for item in self.goes)


def look(workspace: Path, keep: int | None = None, older_than: timedelta | None = None) -> Found:
    """Find what can be removed.

    Args:
        keep: number of newest finished runs to keep.
        older_than: also keep runs started within this time. With neither, keep all.

    Raises InputError: no run was ever recorded there, or one of its folders is a link.
    """
    if not (workspace / runs.FOLDER).is_dir():
        raise InputError(f"{workspace}: no run was recorded here; only workspaces with runs are cleaned")
    for name in (runs.FOLDER, _STAGES, _RELEASES):
        if (workspace / name).is_symlink():
            raise InputError(f"{workspace / name}: a link, and links are not followed; clean the folder it points to")
    found = Found({path.name: size(path) for path in sorted(workspace.iterdir()) if not path.is_symlink()})
    kept = runs.list_runs(workspace)
    if keep is not None or older_than is not None:
        ended = [run for run in kept if not run.alive]
        late = datetime.now(UTC) - (older_than or timedelta())
        for run in ended[keep or 0 :]:
            if older_than is None or run.started < late:
                kept.remove(run)
                found.goes.append(
                    Item("run", run.folder, size(run.folder), f"{run.state}, {run.started:%Y-%m-%d %H:%M}")
                )
    used = set().union(*(runs.uses(run) for run in kept))
    for folder in _made(workspace / _STAGES):
        if (_STAGES, folder.name) not in used:
            found.goes.append(Item("stage", folder, size(folder), "no kept run uses it"))
    published = cache(partial(_published, workspace))
    for folder in _made(workspace / _RELEASES):
        if (_RELEASES, folder.name) not in used:
            why, stays = _why_release(folder, published)
            (found.stays if stays else found.goes).append(Item("release", folder, size(folder), why))
    for folder in _interrupted(workspace / _STAGES):
        what = "measurement" if folder.name.startswith(TIMINGS) else "training"
        found.goes.append(Item("training", folder, size(folder), f"state of an interrupted {what}"))
    for parent in (runs.FOLDER, _STAGES, _RELEASES):
        for folder in temporary.abandoned(workspace / parent):
            found.goes.append(Item("temporary", folder, size(folder), "left unfinished by a killed process"))
    return found


def remove(workspace: Path, found: Found) -> tuple[list[Item], list[Item]]:
    """Remove what can be removed; return what was removed, and what was not because it is in use again.

    Only one clean runs at a time; others wait. Runs may start and continue meanwhile.
    """
    went: list[Item] = []
    busy: list[Item] = []
    with locks.held(workspace / runs.FOLDER / ".clean"):
        for item in found.goes:
            (went if _remove(workspace, item) else busy).append(item)
    return went, busy


def size(path: Path) -> int:
    """Bytes of all files in a folder, or of a file; files that vanish meanwhile are ignored, and links not followed."""
    total = 0
    for where, _, files in os.walk(path):
        for name in files:
            total += _bytes(Path(where) / name)
    return total if path.is_dir() else _bytes(path)


# --- details --------------------------------------------------------------------------------------


def _remove(workspace: Path, item: Item) -> bool:
    if item.kind == "temporary":
        temporary.sweep(item.path.parent)
        return not item.path.exists()
    if item.kind == "run":
        run = next((run for run in runs.list_runs(workspace) if run.folder == item.path), None)
        if run is None:
            return True
        with runs.only_if_over(run) as over:
            if over:
                temporary.remove(item.path)
            return over
    try:
        if item.kind == "training":
            with locks.held(item.path / TRAINING_LOCK, timeout_s=0):
                temporary.remove(item.path)
            return True
        # A run that reuses the stage marks it while holding this lock: either it is marked by now, or it is recomputed.
        with exclusive(item.path, wait=False):
            if runs.is_used(workspace, item.path):
                return False
            if item.path.exists():
                temporary.remove(item.path)
            return True
    except locks.Held:
        return False


def _made(parent: Path) -> list[Path]:
    named = [path for path in parent.iterdir() if _MADE.fullmatch(path.name)] if parent.is_dir() else []
    return [path for path in sorted(named) if path.is_dir() and not path.is_symlink()]


def _interrupted(parent: Path) -> list[Path]:
    """States of trainings and measurements that no process holds."""
    found = [path for kind in (TRAINING, TIMINGS) for path in sorted(parent.glob(f"{kind}*/{TRAINING_LOCK}"))]
    return [path.parent for path in found if locks.is_free(path)]


def _bytes(path: Path) -> int:
    try:
        return path.lstat().st_size
    except FileNotFoundError:
        return 0


def _why_release(folder: Path, published: Callable[[str, str], frozenset[str]]) -> tuple[str, bool]:
    """Why an unused release can be removed or, with True, is kept: it was published, or that is unknown."""
    try:
        digest = manifest.read(folder).digest
        asked = recipe.load(folder / "recipe.toml").registry
        if any(digest in published(uri, asked.name) for uri in {"workspace", asked.uri}):
            return "published", True
    except (NumpruneError, OSError) as error:
        return f"cannot tell whether it was published: {error}", True
    return "not in the registry, and no kept run uses it", False


def _published(workspace: Path, uri: str, name: str) -> frozenset[str]:
    """Digests of all releases in a registry; `name` is the model to which the release would have been published."""
    embedded = uri == "workspace"
    if embedded and not (workspace / "registry" / "mlflow.db").exists():
        return frozenset()
    from numprune.serving import registry

    return registry.published_digests(registry.open_registry(None if embedded else uri, workspace), name)
