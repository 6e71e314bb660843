"""Deploys a version from the registry: resolve, download, verify, audit, and check the running server.

`prepare` returns a folder that may be served; a server of it that passes `prove` may take traffic.
"""

import logging
import os
import shutil
import time
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from numprune.errors import InputError, IntegrityError
from numprune.export import locks, manifest
from numprune.serving import reference_answers, registry
from numprune.serving.registry import Registry, Version
from numprune.serving.registry.releases import CHECKPOINT
from numprune.serving.registry.versions import resolve
from numprune.serving.vllm import server
from numprune.serving.vllm.server import Server, ServerError

logger = logging.getLogger(__name__)

_DIGITS = 16  # of a release's digest, in the name of its copy
_PREPARED_S = 3600.0
_LOGS = 20  # of one kind


@dataclass(frozen=True)
class Deployment:
    """A release on this machine, verified and audited.

    Attributes:
        reference: NAME/VERSION, never an alias, which may move.
        digest: of the release's manifest.
        folder: a copy of the release.
        dtype: of the stored weights, in which the release was measured.
    """

    reference: str
    name: str
    version: int
    digest: str
    folder: Path
    dtype: str

    @property
    def checkpoint(self) -> Path:
        return self.folder / CHECKPOINT


def prepare(opened: Registry, reference: str, workspace: Path) -> Deployment:
    """Get a release ready to be served; a bare name means production.

    Copies are kept in the workspace, by digest, and verified on every use; a damaged one is fetched again.

    Raises InputError (no such version), IntegrityError (a file differs from what was published, or a tensor contradicts
    the configuration), RegistryError.
    """
    with opened.speaking():
        version = resolve(opened, registry.parse(reference))
    folder = _copy(workspace, version.name, version.digest)
    with locks.held(folder.with_name(f".{folder.name}.lock")):
        _fetch(opened, version, folder)
        dtype = _audit(folder / CHECKPOINT)
        reference_answers.read(folder)
        os.utime(folder)  # for `remove_copies`
    logger.info("%s: %s, verified and audited", version.reference, folder)
    return Deployment(version.reference, version.name, version.version, version.digest, folder, dtype)


def _fetch(opened: Registry, version: Version, folder: Path) -> None:
    if folder.exists():
        try:
            if manifest.verify(folder).digest == version.digest:
                return
            reason = "it holds another release"
        except IntegrityError as error:
            reason = str(error)
        logger.warning("%s: the copy is damaged (%s): removed, and fetched again", version.reference, reason)
        shutil.rmtree(folder)
    registry.fetch(opened, version.reference, folder)


def _audit(checkpoint: Path) -> str:
    """The precision of the stored weights, after checking their shapes. Raises IntegrityError."""
    from numprune.export import precision  # the tensor libraries
    from numprune.export.checkpoint import audit

    audit(checkpoint)
    return precision.stored(checkpoint)


def choose_dtype(deployment: Deployment, asked: str) -> str:
    """The precision that "auto" means: that of the weights; vLLM's own "auto" would halve float32.

    Raises InputError if servers cannot be checked in it.
    """
    chosen = deployment.dtype if asked == "auto" else asked
    if chosen not in reference_answers.TOLERANCES:
        raise InputError(f"--dtype {asked} ({chosen}): must be one of auto, {', '.join(reference_answers.TOLERANCES)}")
    return chosen


def prove(running: Server, deployment: Deployment, dtype: str) -> dict[str, Any]:
    """Check a ready server against the reference answers of its release: see `reference_answers.check`.

    Raises ParityError; ServerError, with vLLM's last lines if it died during the check.
    """
    try:
        reference = reference_answers.read(deployment.folder)
        found = reference_answers.check(running.url, reference, dtype, running.api_key)
    except ServerError:
        running.require_alive(server.SETTLE_S)
        raise
    running.require_alive()
    logger.info("%s: server check passed in %s: %s", deployment.reference, dtype, reference_answers.told(found))
    return found


def remove_copies(workspace: Path, name: str, keep: Collection[str]) -> None:
    """Remove the copies of releases of `name` that are no longer needed.

    Kept are those with a digest in `keep`, those of running servers, and those prepared within the last hour, whose
    servers may not have started yet. A removed copy is fetched again when needed.
    """
    served = workspace.absolute() / "served"
    kept = {_copy(workspace, name, digest) for digest in keep}
    kept |= {checkpoint.parent for checkpoint in server.served_checkpoints()}
    for folder in served.glob(f"{name}-{'[0-9a-f]' * _DIGITS}"):
        if folder not in kept and time.time() - folder.stat().st_mtime > _PREPARED_S:
            logger.info("%s: no longer served: removed", folder)
            shutil.rmtree(folder)


def log_file(workspace: Path, what: str) -> Path:
    """The log file of a new process, with `what` in its name; all but the newest older ones are removed."""
    folder = workspace.absolute() / "logs"
    older = sorted(folder.glob(f"{what}-{'?' * 8}T{'?' * 6}-*.log"), reverse=True)
    for log in older[_LOGS - 1 :]:
        log.unlink(missing_ok=True)
    now = datetime.now(UTC)
    return folder / f"{what}-{now:%Y%m%dT%H%M%S}-{os.getpid()}.log"


def _copy(workspace: Path, name: str, digest: str) -> Path:
    """The place of a release's copy."""
    return workspace.absolute() / "served" / f"{name}-{digest[:_DIGITS]}"
