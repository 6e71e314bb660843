"""A registry on a server: its address and version, and artifacts behind MLflow's own client."""

import dataclasses
import json
import os
import secrets
import shutil
import socket
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from numprune.errors import IntegrityError
from numprune.export import manifest
from numprune.serving import registry as registries
from numprune.serving.registry import Registry, RegistryError, connection, publishing
from numprune.serving.registry.artifacts import ServerArtifacts
from numprune.serving.registry.versions import RELEASE, VERDICT
from tests.serving.servers import answering, storing
from tests.serving.workspaces import NAME, WEIGHTS, MakeRelease, contents, flip_bit

VERSION = {"/version": (200, "3.17.2")}

# --- artifacts behind MLflow's own client, as with a server ------------------------------------------


@pytest.fixture
def remote(registry: Registry, tmp_path: Path) -> Iterator[Registry]:
    """Versions in MLflow's SQLite still, as its server needs packages that we do not; files over HTTP."""
    with storing(tmp_path / "remöte") as address:
        yield remote_with(registry, address)


def remote_with(registry: Registry, location: str) -> Registry:
    """With this artifact location."""
    experiment = registry.client.create_experiment("remote", artifact_location=location)
    artifacts = ServerArtifacts(registry.client, registry.uri)
    return dataclasses.replace(registry, artifacts=artifacts, experiment=experiment, embedded=False)


@pytest.mark.slow
def test_files_round_trip_through_mlflow(remote: Registry, make_release: MakeRelease, tmp_path: Path) -> None:
    first, second = make_release("a"), make_release("b")
    version = registries.publish(remote, first, NAME)
    assert registries.publish(remote, first, NAME) == version
    assert registries.publish(remote, second, NAME).version == 2
    assert registries.show(remote, f"{NAME}/1").files[WEIGHTS] == 1000
    assert registries.fetch(remote, f"{NAME}/1", tmp_path / "out").version == 1
    assert contents(tmp_path / "out") == contents(first)
    assert registries.promote(remote, f"{NAME}/1").version == 1
    assert registries.promote(remote, NAME).version == 2

    flip_bit(tmp_path / "remöte" / version.run_id / "artifacts" / "release" / WEIGHTS)
    for broken in (registries.verify, registries.promote):
        with pytest.raises(IntegrityError, match=rf"MLflow run {version.run_id}/{WEIGHTS}: its SHA-256"):
            broken(remote, f"{NAME}/1")
    with pytest.raises(IntegrityError, match=f"{NAME}/1/{WEIGHTS}: its SHA-256"):
        registries.fetch(remote, f"{NAME}/1", tmp_path / "again")
    with pytest.raises(IntegrityError, match=WEIGHTS):
        registries.rollback(remote, NAME)
    assert registries.verify(remote, NAME).version == 2
    shutil.rmtree(tmp_path / "remöte" / version.run_id / "artifacts" / "release")
    for broken in (registries.verify, registries.show):
        with pytest.raises((IntegrityError, RegistryError), match=version.run_id):
            broken(remote, f"{NAME}/1")
    assert not [name for name in os.listdir(tmp_path) if "again" in name]


def test_a_store_names_its_missing_package(
    registry: Registry, make_release: MakeRelease, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the server hands out addresses of its store instead of passing the files on."""
    monkeypatch.setitem(sys.modules, "boto3", None)
    remote = remote_with(registry, "s3://bucket/releases")
    with pytest.raises(RegistryError, match=r"registry .*needs the Python package boto3; install it here"):
        registries.publish(remote, make_release(), NAME)
    assert registries.list_versions(remote, NAME) == []


@pytest.mark.parametrize("form", ["{folder}", "file://{folder}"])
def test_no_local_folder_is_used_for_a_server(
    registry: Registry, make_release: MakeRelease, tmp_path: Path, form: str
) -> None:
    """MLflow's client takes the path that a server gives for its own."""
    folder = tmp_path / "srv"
    remote = remote_with(registry, form.format(folder=folder))
    with pytest.raises(RegistryError, match=rf"keeps artifacts in {form.format(folder=folder)}/.*, a local folder, "):
        registries.publish(remote, make_release(), NAME)
    assert not list(folder.rglob("*.safetensors"))
    assert registries.list_versions(remote, NAME) == []

    # A version from before this was refused: its files are whole, on the disk of whoever published it.
    run = remote.client.create_run(remote.experiment)
    release = make_release()
    remote.client.log_artifacts(run.info.run_id, str(release), "release")
    tags = {RELEASE: manifest.read(release).digest, VERDICT: "pass"}
    remote.client.create_model_version(NAME, source=str(folder), run_id=run.info.run_id, tags=tags)
    for ask in (registries.verify, registries.promote, registries.show):
        with pytest.raises(RegistryError, match=r"a local folder, .*publish the release again"):
            ask(remote, f"{NAME}/1")


@pytest.mark.parametrize(
    ("location", "shared"),
    [
        ("/srv/mlflow/1", False),
        ("srv/mlflow/1", False),
        ("file:///srv/mlflow/1", False),
        ("C:/mlflow/1", False),
        ("mlflow-artifacts:/1", True),
        ("s3://bucket/1", True),
        ("https://mlflow.example/api/2.0/mlflow-artifacts/artifacts/1", True),
    ],
)
def test_a_server_whose_artifact_location_is_a_local_folder_is_refused_when_connecting(
    tmp_path: Path, location: str, shared: bool
) -> None:
    """MLflow's own answer, as with `mlflow server --default-artifact-root /srv/mlflow --no-serve-artifacts`."""
    experiment = {
        "experiment_id": "7",
        "name": "numprune",
        "artifact_location": location,
        "lifecycle_stage": "active",
        "last_update_time": 1795856395069,
        "creation_time": 1795856395069,
    }
    answers = {**VERSION, "/api/2.0/mlflow/experiments/get-by-name": (200, json.dumps({"experiment": experiment}))}
    with answering(answers) as uri:
        if shared:
            assert registries.open_registry(uri, tmp_path).experiment == "7"
            return
        with pytest.raises(RegistryError, match=rf"keeps artifacts in {location}, a local folder") as refused:
            registries.open_registry(uri, tmp_path)
    assert "--serve-artifacts" in str(refused.value)
    assert "rename --experiment-id 7 --new-name numprune-7" in str(refused.value)


# --- several publishers at once ---------------------------------------------------------------------


def test_a_publisher_elsewhere_is_left_alone(remote: Registry, make_release: MakeRelease) -> None:
    alive = remote.client.create_run(remote.experiment, tags={"numprune.publisher": "elsewhere 1 1.00"})
    dead = remote.client.create_run(remote.experiment, tags={"numprune.publisher": f"{socket.gethostname()} 1 1.00"})
    registries.publish(remote, make_release(), NAME)
    stages = {run.info.run_id: run.info.lifecycle_stage for run in map(remote.client.get_run, _ids(alive, dead))}
    assert stages == {alive.info.run_id: "active", dead.info.run_id: "deleted"}


def _ids(*runs: Any) -> list[str]:
    return [run.info.run_id for run in runs]


def test_the_first_of_two_identical_remote_publications_wins(
    remote: Registry, make_release: MakeRelease, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No lock reaches over machines: the other one publishes between our look and our version."""
    release = make_release()
    put = ServerArtifacts.put

    def while_another_publishes(self: ServerArtifacts, run_id: str, folder: Path) -> str:
        monkeypatch.setattr(ServerArtifacts, "put", put)
        elsewhere = dataclasses.replace(remote, lock_file=remote.lock_file.with_name("elsewhere"))
        monkeypatch.setattr(publishing, "_is_dead", lambda _: False)
        registries.publish(elsewhere, folder, NAME)
        return put(self, run_id, folder)

    monkeypatch.setattr(ServerArtifacts, "put", while_another_publishes)
    assert registries.publish(remote, release, NAME).version == 1
    assert [version.version for version in registries.list_versions(remote, NAME)] == [1]
    assert len(remote.client.search_runs([remote.experiment])) == 1


# --- addresses --------------------------------------------------------------------------------------


@pytest.mark.parametrize("uri", ["sqlite:///x.db", "mlruns", "", "file:///x", "databricks"])
def test_only_server_addresses_are_accepted(uri: str, tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="not an MLflow server's address"):
        registries.open_registry(uri, tmp_path)


def test_an_unreachable_server_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(RegistryError, match=r"http://127\.0\.0\.1:1 cannot be reached \(Connection refused\): .*again"):
        registries.open_registry("http://127.0.0.1:1", tmp_path)


@pytest.mark.parametrize(
    ("status", "version", "message"),
    [
        (
            200,
            "2.20.4",
            r"MLflow 2\.20\.4 is not supported; update the server to 2\.21 or newer, below 4\.0",
        ),
        (200, "1.30.0", r"MLflow 1\.30\.0 is not"),
        (200, "4.0.0", r"MLflow 4\.0\.0 is not"),
        (
            200,
            "<!doctype html><title>Log in</title>",
            r"/version returned 200 .*Log in.*login page",
        ),
        (404, "2.21", "returned 404 .*check the address"),
        (401, "", r"rejects the credentials \(401\)"),
    ],
)
def test_unsupported_servers_are_refused_when_connecting(
    tmp_path: Path, status: int, version: str, message: str
) -> None:
    with answering({"/version": (status, version)}) as uri, pytest.raises(RegistryError, match=message):
        registries.open_registry(uri, tmp_path)


@pytest.mark.parametrize("version", ["2.21.0", "2.22.0rc1", "3.17.2", "3.18.1.dev0"])
def test_supported_servers_are_used(tmp_path: Path, version: str) -> None:
    with answering({"/version": (200, version)}) as uri, pytest.raises(RegistryError, match="experiments/get-by-name"):
        registries.open_registry(uri, tmp_path)


def test_an_unresponsive_server_does_not_get_the_upload_timeout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    monkeypatch.setattr(connection, "_VERSION_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        message = rf"registry {uri} cannot be reached \(timed out\): check that it is running"
        with pytest.raises(RegistryError, match=message) as refused:
            registries.open_registry(uri, tmp_path)
    assert "read timeout=0.2" in str(refused.value.__cause__)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        (
            "http://ann:s3cret@mlflow.example",
            r"http://\*\*\*@mlflow.example: contains credentials; set MLFLOW_TRACKING_USER",
        ),
        ("https://:s3cret@mlflow.example/x", "contains credentials"),
        (
            "postgresql://ann:s3cr@et@db.example/mlflow",
            r"'postgresql://\*\*\*@db.example/mlflow': not an MLflow server's",
        ),
        ("http://mlflow.example?token=s3cret", "cannot contain"),
    ],
)
def test_addresses_with_secrets_are_refused_without_repeating_them(uri: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match=message) as refused:
        registries.open_registry(uri, tmp_path)
    assert "s3cr" not in str(refused.value)
    assert "ann:" not in str(refused.value)


@pytest.mark.parametrize("name", ["MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD"])
def test_neither_errors_nor_tracebacks_contain_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A token with the line break of the file it was read from is repeated by MLflow's own error."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    secret = secrets.token_hex()  # a traceback also shows lines of this file
    monkeypatch.setenv(name, f"{secret}\n")
    with pytest.raises(RegistryError) as refused:
        registries.open_registry(f"http://127.0.0.1:1/{secret}", tmp_path)
    assert secret not in "".join(traceback.format_exception(refused.value))
    if name == "MLFLOW_TRACKING_TOKEN":
        assert "MLFLOW_TRACKING_TOKEN cannot be sent" in str(refused.value)
