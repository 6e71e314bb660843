"""Opens a registry: the embedded one (a SQLite file and a folder) or an MLflow server.

MLflow is imported only here and only when a registry is opened, because the import takes a second.
"""

import hashlib
import logging
import os
import re
import secrets
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from numprune.export import locks
from numprune.export.imports import uncollected
from numprune.serving.problems import short
from numprune.serving.registry.artifacts import Artifacts, LocalArtifacts, ServerArtifacts, require_shared
from numprune.serving.registry.errors import RegistryError, error_code, speaking, without_secrets

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment

EXPERIMENT = "numprune"  # the MLflow experiment whose runs hold the artifacts
_LOCK_TIMEOUT_S = 600.0  # longer than verifying a large release takes

_QUIET = {  # none of these overrides user settings
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",  # some 12 s, in which a server may restart; MLflow's own 7 take minutes
}
_VERSION_TIMEOUT_S = 10  # for this request only: an upload returns only once the server has forwarded it
# MLflow servers up to 2.20 answer searches of a newer client with empty lists instead of an error.
_SUPPORTED_FROM, _SUPPORTED_BELOW = (2, 21), (4, 0)
_SUPPORTED = "2.21 or newer, below 4.0"


@dataclass(frozen=True)
class Registry:
    """An open registry. All changes happen inside `exclusive`."""

    uri: str
    client: "MlflowClient"
    artifacts: Artifacts
    experiment: str  # its id
    embedded: bool
    lock_file: Path

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """One writer at a time: globally on the embedded registry, per workspace on a server."""
        with _locked(self.lock_file), self.speaking():
            yield

    @contextmanager
    def speaking(self) -> Iterator[None]:
        """Convert errors of MLflow and its store into a RegistryError that names the registry."""
        with speaking(f"registry {self.uri}"):
            yield


def open_registry(uri: str | None, workspace: Path) -> Registry:
    """Open the registry at `uri`, an MLflow server's http(s) address, or, with None, the workspace's own.

    The workspace's own is `registry/` in it, made on first use: `mlflow.db` and `artifacts/`. It may be moved. Any
    number of processes may open it concurrently.

    Raises RegistryError: not a server address, no response, an unsupported MLflow version, or a server whose artifact
    location is a local folder.
    """
    root = workspace.absolute() / "registry"
    if uri is None:
        return _open_embedded(root)
    _require_address(uri)
    with speaking(f"registry {uri}"):
        client = _client(uri)
        _require_supported(uri)
        experiment = _experiment(client, None)
        require_shared(experiment.artifact_location, f"registry {uri}", _relocation(uri, experiment))
        return Registry(
            uri=uri,
            client=client,
            artifacts=ServerArtifacts(client, uri),
            experiment=experiment.experiment_id,
            embedded=False,
            lock_file=root / f"{hashlib.sha256(uri.encode()).hexdigest()[:16]}.lock",
        )


def _require_address(uri: str) -> None:
    if not uri.startswith(("http://", "https://")):
        raise RegistryError(
            f"{without_secrets(uri)!r}: not an MLflow server's address (http://… or https://…); "
            "without one, the workspace's own registry is used"
        )
    if "@" in uri:  # it would appear in process lists, recipes and logs
        raise RegistryError(
            f"{without_secrets(uri)}: contains credentials; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, "
            "or MLFLOW_TRACKING_TOKEN, instead"
        )
    if "?" in uri or "#" in uri:
        raise RegistryError(f"{uri.partition('?')[0]}: an MLflow server's address cannot contain '?' or '#'")


def _require_supported(uri: str) -> None:
    """Check the server's version. Sent first, with a short timeout, because other requests retry for minutes.

    Raises RegistryError: no version in the response, or an unsupported one.
    """
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    answer = http_request(get_default_host_creds(uri), "/version", "GET", timeout=_VERSION_TIMEOUT_S)
    if answer.status_code in (401, 403) or answer.status_code >= 500:
        answer.raise_for_status()
    version = answer.text.strip()
    found = re.fullmatch(r"(\d{1,4})\.(\d{1,4})[\w.+-]{0,40}", version) if answer.ok else None
    if found is None:
        raise RegistryError(
            f"registry {uri}: {uri}/version returned {answer.status_code} and {short(version)} instead of an MLflow "
            "version; check the address, and that no proxy or login page intercepts /version"
        )
    if not _SUPPORTED_FROM <= (int(found[1]), int(found[2])) < _SUPPORTED_BELOW:
        raise RegistryError(f"registry {uri}: MLflow {version} is not supported; update the server to {_SUPPORTED}")


def _open_embedded(root: Path) -> Registry:
    if any(mark in str(root) for mark in "?#%"):
        raise RegistryError(f"{root}: a database's address cannot hold '?', '#' or '%'; choose another workspace")
    database, lock = root / "mlflow.db", root / "lock"
    uri = f"sqlite:///{database}"
    # Two processes that create MLflow's tables at the same time crash one of them, and a killed one must not leave half
    # of them. So only one at a time, and under another name first.
    with speaking(f"registry {root}"), _locked(lock):
        for leftover in root.glob("mlflow.db.*.partial*"):
            leftover.unlink()
        if not database.exists():
            _create_database(database)
        _require_usable(database)
        client = _client(uri)
        return Registry(
            uri=uri,
            client=client,
            artifacts=LocalArtifacts(root / "artifacts"),
            experiment=_experiment(client, root / "artifacts").experiment_id,
            embedded=True,
            lock_file=lock,
        )


def _create_database(database: Path) -> None:
    partial = database.with_name(f"{database.name}.{secrets.token_hex(8)}.partial")
    partial.touch()
    _experiment(_client(f"sqlite:///{partial}"), database.parent / "artifacts")
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.rename(database)


def _require_usable(database: Path) -> None:
    """Detect a damaged or read-only database here: MLflow would retry for half an hour."""
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("SELECT version_num FROM alembic_version")
        connection.execute("BEGIN IMMEDIATE")
        connection.rollback()


def _client(uri: str) -> "MlflowClient":
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    with uncollected():
        from mlflow import MlflowClient

        for name in ("mlflow", "alembic"):  # they log every table they create
            logging.getLogger(name).setLevel(max(logging.getLogger(name).level, logging.WARNING))
        return MlflowClient(tracking_uri=uri, registry_uri=uri)  # imports its store


def _experiment(client: "MlflowClient", artifacts: Path | None) -> "Experiment":
    """Our experiment, created if missing."""
    found = client.get_experiment_by_name(EXPERIMENT)
    if found is None:
        try:
            client.create_experiment(EXPERIMENT, artifact_location=None if artifacts is None else artifacts.as_uri())
        except Exception as error:
            if error_code(error) != "RESOURCE_ALREADY_EXISTS":  # another publisher was faster
                raise
        found = client.get_experiment_by_name(EXPERIMENT)
    if found is None or found.lifecycle_stage != "active":
        raise RegistryError(f"the MLflow experiment {EXPERIMENT!r} was deleted; restore it in MLflow")
    return found


def _relocation(uri: str, experiment: "Experiment") -> str:
    """How to give the experiment a location that all clients can reach; it cannot be changed in place."""
    number = experiment.experiment_id
    return (
        "restart the server with --serve-artifacts and without --default-artifact-root; as an experiment keeps its "
        f"location, then run `MLFLOW_TRACKING_URI={uri} mlflow experiments rename --experiment-id {number} "
        f"--new-name {EXPERIMENT}-{number}`"
    )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the file's flock, which ends with the process, however it ends."""
    with ExitStack() as stack:
        try:
            stack.enter_context(locks.held(path, timeout_s=_LOCK_TIMEOUT_S))
        except locks.Held:
            raise RegistryError(f"{path}: held by another process for {_LOCK_TIMEOUT_S:.0f} s; try again") from None
        except OSError as error:
            raise RegistryError(f"{path}: the registry cannot be locked: {error.strerror}") from None
        yield
