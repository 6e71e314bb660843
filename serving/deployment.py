"""From a version in the registry to a server that has proved itself: resolved, downloaded, verified, audited, compared.

`prepare` ends with a folder that may be served, `deployed` with a server that may take traffic.
"""

import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from numprune.errors import InputError, IntegrityError
from numprune.export import manifest
from numprune.serving import canary, registry
from numprune.serving.registry import Registry, Version
from numprune.serving.registry.releases import CHECKPOINT
from numprune.serving.registry.versions import resolve
from numprune.serving.vllm import server
from numprune.serving.vllm.environment import Environment
from numprune.serving.vllm.server import Server, ServerError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Deployment:
    """A release on this machine, verified and audited.

    Attributes:
        reference: NAME/VERSION, never an alias: that may move.
        digest: of the release's manifest.
        folder: a copy of the release.
        dtype: of the weights as they are stored, and so in which the release was measured.
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

    Copies are kept in the workspace, by digest, and verified on every use; one that is damaged is fetched again.

    Raises InputError (no such version), IntegrityError (a file is not what was published, or a tensor not what the
    configuration says), RegistryError.
    """
    with opened.speaking():
        version = resolve(opened, registry.parse(reference))
    folder = workspace.absolute() / "served" / f"{version.name}-{version.digest[:16]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        _fetch(opened, version, folder)
        dtype = _audit(folder / CHECKPOINT)
        canary.read(folder / canary.REFERENCE)
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
    """The precision of the stored weights, whose shapes are those of the configuration. Raises IntegrityError."""
    from numprune.export.checkpoint import audit, read_config  # the tensor libraries

    audit(checkpoint)
    return str(read_config(checkpoint).dtype or "float32").removeprefix("torch.")


def choose_dtype(deployment: Deployment, asked: str) -> str:
    """The precision that "auto" means: that of the weights; vLLM's own "auto" would halve float32.

    Raises InputError when the canary cannot judge a server in it.
    """
    chosen = deployment.dtype if asked == "auto" else asked
    if chosen not in canary.TOLERANCES:
        raise InputError(f"--dtype {asked} ({chosen}): must be one of auto, {', '.join(canary.TOLERANCES)}")
    return chosen


def prove(running: Server, deployment: Deployment, dtype: str) -> dict[str, Any]:
    """Compare a server that is ready with the reference of its release: see `canary.check`, which gives the result.

    Raises ParityError; ServerError, with vLLM's last lines when it died meanwhile.
    """
    try:
        found = canary.check(running.url, canary.read(deployment.folder / canary.REFERENCE), dtype)
    except ServerError:
        running.require_alive(server.SETTLE_S)
        raise
    running.require_alive()
    logger.info(
        "%s: canary passed in %s: worst difference of a log-probability %.2g nats (limit %g), %.0f %% of greedy tokens",
        deployment.reference,
        dtype,
        found["worst"]["error"],
        found["tolerance"],
        100 * found["greedy_match"],
    )
    return found


@contextmanager
def deployed(
    environment: Environment,
    deployment: Deployment,
    *,
    host: str,
    port: int,
    dtype: str,
    options: Sequence[str],
    log: Path,
    startup_timeout_s: float = server.STARTUP_S,
) -> Iterator[tuple[Server, dict[str, Any]]]:
    """A server of the release and what its canary found; stopped when the block is left.

    Raises what `serving` and `prove` raise.
    """
    with server.serving(
        environment,
        deployment.checkpoint,
        name=deployment.name,
        host=host,
        port=port,
        dtype=dtype,
        options=options,
        log=log,
        startup_timeout_s=startup_timeout_s,
    ) as running:
        yield running, prove(running, deployment, dtype)


def log_file(workspace: Path, what: str) -> Path:
    """Where the output of a new server goes; `what` becomes a part of the name."""
    now = datetime.now(UTC)
    return workspace.absolute() / "logs" / f"{what}-{now:%Y%m%dT%H%M%S}-{os.getpid()}.log"
