"""Opening a registry: the embedded one (a SQLite file and a folder) or an MLflow server.

MLflow is imported here and only when a registry is opened: the import takes a second.
"""

import hashlib
import logging
import os
import secrets
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from numprune.serving.registry.artifacts import Artifacts, LocalArtifacts, ServerArtifacts
from numprune.serving.registry.errors import RegistryError, error_code, speaking, without_secrets

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "numprune"  # the MLflow experiment whose runs hold the artifacts
_LOCK_TIMEOUT_S = 600.0  # longer than verifying a large release takes

_QUIET = {  # none of these overrules what the user set
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",  # some 12 s, in which a server may restart; MLflow's own 7 take minutes
}
_HEALTH_TIMEOUT_S = 10  # for the first word only: an upload is answered when the server has passed it on


@dataclass(frozen=True)
class Registry:
    """An open registry. Everything that changes it happens inside `exclusive`."""

    uri: str
    client: "MlflowClient"
    artifacts: Artifacts
    experiment: str  # its id
    embedded: bool
    lock_file: Path

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """One writer at a time: of all on the embedded registry, of those with this workspace on a server."""
        with _locked(self.lock_file), self.speaking():
            yield

    @contextmanager
    def speaking(self) -> Iterator[None]:
        """What MLflow and its store raise comes out as a RegistryError that names the registry."""
        with speaking(f"registry {self.uri}"):
            yield


def open_registry(uri: str | None, workspace: Path) -> Registry:
    """Open the registry at `uri`, an MLflow server's http(s) address, or, with None, the workspace's own.

    The workspace's own is `registry/` in it, made on first use: `mlflow.db` and `artifacts/`. It may be moved. Any
    number of processes may open it at once. Raises RegistryError.
    """
    root = workspace.absolute() / "registry"
    if uri is None:
        return _open_embedded(root)
    _require_address(uri)
    with speaking(f"registry {uri}"):
        client = _client(uri)
        _require_reachable(uri)
        return Registry(
            uri=uri,
            client=client,
            artifacts=ServerArtifacts(client, uri),
            experiment=_experiment(client, None),
            embedded=False,
            lock_file=root / f"{hashlib.sha256(uri.encode()).hexdigest()[:16]}.lock",
        )


def _require_address(uri: str) -> None:
    if not uri.startswith(("http://", "https://")):
        raise RegistryError(
            f"{without_secrets(uri)!r}: not an MLflow server's address (http://… or https://…); "
            "without one, the workspace's own registry is used"
        )
    if "@" in uri:  # it would be seen in process lists, recipes and logs
        raise RegistryError(
            f"{without_secrets(uri)}: holds credentials; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, "
            "or MLFLOW_TRACKING_TOKEN, instead"
        )
    if "?" in uri or "#" in uri:
        raise RegistryError(f"{uri.partition('?')[0]}: an MLflow server's address has neither '?' nor '#'")


def _require_reachable(uri: str) -> None:
    """Where nothing answers, MLflow's own requests would each wait for two minutes, several times."""
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    http_request(get_default_host_creds(uri), "/health", "GET", timeout=_HEALTH_TIMEOUT_S)


def _open_embedded(root: Path) -> Registry:
    if any(mark in str(root) for mark in "?#%"):
        raise RegistryError(f"{root}: a database's address cannot hold '?', '#' or '%'; choose another workspace")
    database, lock = root / "mlflow.db", root / "lock"
    uri = f"sqlite:///{database}"
    # Two processes that make MLflow's tables at once crash one of them; and whoever is killed meanwhile must not
    # leave half of them. So one at a time, under another name first.
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
            experiment=_experiment(client, root / "artifacts"),
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
    """Let a database that is damaged or read-only fail here: MLflow would try again for half an hour."""
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("SELECT version_num FROM alembic_version")
        connection.execute("BEGIN IMMEDIATE")
        connection.rollback()


def _client(uri: str) -> "MlflowClient":
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):  # they tell of every table they make
        logging.getLogger(name).setLevel(max(logging.getLogger(name).level, logging.WARNING))
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _experiment(client: "MlflowClient", artifacts: Path | None) -> str:
    """The id of our experiment, made when it is not there."""
    found = client.get_experiment_by_name(EXPERIMENT)
    if found is None:
        try:
            location = None if artifacts is None else artifacts.as_uri()
            return str(client.create_experiment(EXPERIMENT, artifact_location=location))
        except Exception as error:
            if error_code(error) != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(EXPERIMENT)  # another publisher was faster
    if found is None or found.lifecycle_stage != "active":
        raise RegistryError(f"the MLflow experiment {EXPERIMENT!r} was deleted; restore it in MLflow")
    return str(found.experiment_id)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the file's flock: it ends with the process, however that ends."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, timeout=_LOCK_TIMEOUT_S)
        lock.acquire()
    except Timeout:
        raise RegistryError(f"{path}: held by another process for {_LOCK_TIMEOUT_S:.0f} s; try again") from None
    except OSError as error:
        raise RegistryError(f"{path}: the registry cannot be locked: {error.strerror}") from None
    try:
        yield
    finally:
        lock.release()
