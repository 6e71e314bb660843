"""A release: everything that is published, in one folder."""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from numprune.errors import IntegrityError
from numprune.export import disk, manifest
from numprune.flows import runs
from numprune.flows.names import CHECKPOINT
from numprune.flows.recipe import Recipe
from numprune.flows.stages import exclusive, is_whole
from numprune.plans import PLAN_FILE
from numprune.serving import reference_answers

logger = logging.getLogger(__name__)


def make_release(
    workspace: Path,
    recipe: Recipe,
    parts: Mapping[str, Path],
    report: Path,
    answers: Path | None,
    used_by: Path | None = None,
) -> Path:
    """Return the folder of a release, building it if necessary.

    It contains the parts, report.json, report.md, report.html, reference-answers.json, recipe.toml and plan.json.

    Args:
        parts: folder name in the release -> an artifact folder; "checkpoint" is one of them.
        report: the folder with report.json, report.md and report.html.
        answers: the folder with reference-answers.json; None if the release cannot be served.
        used_by: the folder of the run that publishes it (see runs.py).

    The same content gives the same folder with the same digest, so that publishing it twice publishes it once.
    Raises DiskError (no space), IntegrityError (a file to be copied has changed since it was created).
    """
    parents = {name: manifest.read(folder).digest for name, folder in parts.items()}
    parents["report"] = manifest.read(report).digest
    if answers is not None:
        parents["reference-answers"] = manifest.read(answers).digest
    facts: dict[str, Any] = {"name": recipe.registry.name, "recipe": recipe.digest}
    key = hashlib.sha256(json.dumps([parents, facts], sort_keys=True).encode()).hexdigest()
    folder = workspace / "releases" / f"{recipe.registry.name}-{key[:16]}"
    with exclusive(folder):
        runs.mark(used_by, folder)
        if folder.exists() and is_whole(folder, key):
            return folder
        with manifest.creating(folder, kind="release", parents=parents, facts={**facts, "key": key}) as content:
            disk.require_room(folder, sum(disk.bytes_below(part) for part in parts.values()))
            for name, part in parts.items():
                shutil.copytree(part, content / name)
                with _unchanged(part):
                    manifest.verify(content / name)
            files = [(report, "report.json"), (report, "report.md"), (report, "report.html")]
            files += [(answers, reference_answers.FILE_NAME)] if answers is not None else []
            for source, name in files:
                shutil.copyfile(source / name, content / name)
                with _unchanged(source):
                    manifest.verify_file(content / name, manifest.read(source).files[name])
            shutil.copyfile(parts[CHECKPOINT] / PLAN_FILE, content / "plan.json")
            (content / "recipe.toml").write_text(recipe.to_toml(), encoding="utf-8")
    return folder


@contextmanager
def _unchanged(source: Path) -> Iterator[None]:
    """The release gets a new manifest, so damage since the stage was verified would otherwise go unnoticed."""
    try:
        yield
    except IntegrityError as error:
        raise IntegrityError(
            f"{source}: damaged since this run verified it; run the same command again to recompute it ({error})"
        ) from None
