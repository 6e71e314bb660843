"""Storage of a release's files: a folder of the workspace, or an MLflow server.

MLflow addresses them by the run that wrote them; each of our runs holds one folder, `release`.
"""

import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit

from numprune.errors import IntegrityError, NumpruneError
from numprune.export import disk, manifest
from numprune.export.manifest import Manifest
from numprune.serving.registry.errors import RegistryError, speaking, without_secrets

if TYPE_CHECKING:
    from mlflow import MlflowClient

FOLDER = "release"

_FAILED = re.compile(r"##### File (.+?) #####\n(.*)")  # of a folder's files, in MLflow's message

_RUN_ID = re.compile(r"[0-9a-f]{32}")


class Artifacts(Protocol):
    """The releases of runs. Only `put` verifies files."""

    def put(self, run_id: str, release: Path) -> str:
        """Store a release folder under a run that has none; returns its address."""
        ...

    def at(self, run_id: str, only: Sequence[str] | None = None) -> AbstractContextManager[Path]:
        """The stored release as a folder within the context; with `only`, at least the files of these names."""
        ...

    def copy(self, run_id: str, into: Path) -> None:
        """Copy the stored release, manifest included, into an empty folder."""
        ...

    def remove(self, run_id: str) -> None:
        """Remove the release of a run, if the store can."""
        ...


class LocalArtifacts:
    """`<root>/<run id>/artifacts/release`: in MLflow's layout, but located without MLflow's recorded address, because
    the workspace may have moved.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def put(self, run_id: str, release: Path) -> str:
        out = self._folder(run_id)
        found = manifest.verify(release)
        disk.require_room(out, sum(entry.size for entry in found.files.values()))
        with manifest.creating(out, kind=found.kind, parents=found.parents, facts=found.facts) as partial:
            for name in found.files:
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(release / name, partial / name)
        require_digest(manifest.read(out), found.digest, out)  # the release may have changed meanwhile
        return out.as_uri()

    @contextmanager
    def at(self, run_id: str, only: Sequence[str] | None = None) -> Iterator[Path]:
        folder = self._folder(run_id)
        if not folder.is_dir():
            raise IntegrityError(f"{folder}: missing; publish the same release again to restore it")
        yield folder

    def copy(self, run_id: str, into: Path) -> None:
        with self.at(run_id) as folder:
            shutil.copytree(folder, into, dirs_exist_ok=True)

    def remove(self, run_id: str) -> None:
        run = self._folder(run_id).parent.parent
        if run.exists():
            shutil.rmtree(run)

    def _folder(self, run_id: str) -> Path:
        if not _RUN_ID.fullmatch(run_id):  # it becomes part of a path
            raise IntegrityError(f"{run_id!r} is not the id of an MLflow run")
        return self._root / run_id / "artifacts" / FOLDER


class ServerArtifacts:
    """Files on an MLflow server, through its client."""

    def __init__(self, client: "MlflowClient", uri: str) -> None:
        self._client = client
        self._uri = uri

    def put(self, run_id: str, release: Path) -> str:
        expected = manifest.verify(release)
        address = self._address(run_id)
        self._client.log_artifacts(run_id, str(release), FOLDER)
        with self.at(run_id) as stored:
            require_digest(manifest.verify(stored), expected.digest, f"MLflow run {run_id}")
        return f"{address}/{FOLDER}"

    @contextmanager
    def at(self, run_id: str, only: Sequence[str] | None = None) -> Iterator[Path]:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "whole"
            folder.mkdir()
            if only is None:
                self.copy(run_id, folder)
            for name in only or ():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                self._download(run_id, f"{FOLDER}/{name}", Path(scratch)).rename(folder / name)
            with calling(folder, f"MLflow run {run_id}"):
                yield folder

    def copy(self, run_id: str, into: Path) -> None:
        with tempfile.TemporaryDirectory(dir=into) as scratch:  # a rename, not a second copy; gone when `into` is
            for item in self._download(run_id, FOLDER, Path(scratch)).iterdir():
                item.rename(into / item.name)

    def _download(self, run_id: str, path: str, into: Path) -> Path:
        """Download below `into`; the returned place depends on the server's store."""
        from mlflow.artifacts import download_artifacts

        where = f"registry {self._uri}, MLflow run {run_id}"
        try:
            # By address: downloading by run, MLflow hides the cause of an error.
            address = f"{self._address(run_id)}/{path}"
            landed = Path(download_artifacts(artifact_uri=address, dst_path=str(into), tracking_uri=self._uri))
        except NumpruneError:
            raise
        except Exception as error:
            failed = "; ".join(f"{file}: {reason}" for file, reason in _FAILED.findall(str(error)))
            if failed:
                raise RegistryError(
                    f"{where}: cannot be downloaded: {without_secrets(failed)}. Try again; if it still fails, restore "
                    "the file from a backup of the server's store"
                ) from None
            with speaking(f"{where}, {path}"):
                raise
        if not landed.exists():  # MLflow represents missing artifacts as an empty folder
            raise IntegrityError(f"{where}: {path} is missing")
        return landed

    def _address(self, run_id: str) -> str:
        """The location of a run's artifacts. Raises RegistryError when it is a local folder."""
        address = str(self._client.get_run(run_id).info.artifact_uri)
        require_shared(
            address,
            f"registry {self._uri}, MLflow run {run_id}",
            "delete the version in MLflow, and publish the release again",
        )
        return address

    def remove(self, run_id: str) -> None:
        """Do nothing: clients cannot delete files; `mlflow gc` on the server does, once the run is deleted."""


def require_shared(location: str, where: str, remedy: str) -> None:
    """Raises RegistryError if a server's artifact location is a local folder.

    Args:
        where: whose location it is, for the message.
        remedy: for the message.
    """
    scheme = urlsplit(location).scheme
    if len(scheme) < 2 or scheme == "file":  # a single letter is a Windows drive
        raise RegistryError(
            f"{where}: keeps artifacts in {location}, a local folder, so every client would use its own disk; {remedy}"
        )


@contextmanager
def calling(folder: Path, name: str) -> Iterator[Path]:
    """A temporary folder that errors refer to by a meaningful name."""
    try:
        yield folder
    except IntegrityError as error:
        raise IntegrityError(str(error).replace(str(folder), name)) from None


def require_digest(found: Manifest, digest: str, where: Path | str) -> None:
    """Raises IntegrityError unless the manifest is the published one."""
    if found.digest != digest:
        raise IntegrityError(f"{where}: {manifest.FILE_NAME} has the digest {found.digest}, but {digest} was published")
