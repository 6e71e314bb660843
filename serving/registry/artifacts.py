"""Where the files of a release lie: in a folder of the workspace, or behind an MLflow server.

MLflow addresses them by the run that wrote them; every run of ours holds one folder, `release`.
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
    """The releases of runs. Nothing here is verified but what `put` takes in."""

    def put(self, run_id: str, release: Path) -> str:
        """Store a release folder under a run that has none; its address."""
        ...

    def at(self, run_id: str, only: Sequence[str] | None = None) -> AbstractContextManager[Path]:
        """The stored release as a folder to read in the context; with `only`, at least the files of these names."""
        ...

    def copy(self, run_id: str, into: Path) -> None:
        """Copy the stored release, manifest included, into an empty folder."""
        ...

    def remove(self, run_id: str) -> None:
        """Remove the release of a run, as far as this store can."""
        ...


class LocalArtifacts:
    """`<root>/<run id>/artifacts/release`: as MLflow lays it out, but found without the address that MLflow recorded,
    because the workspace may have moved since.
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
        require_digest(manifest.read(out), found.digest, out)  # the release may have changed under our hands
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
    """Behind an MLflow server, through its client."""

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
        """Where below `into` it landed: that depends on the server's kind of store."""
        from mlflow.artifacts import download_artifacts

        where = f"registry {self._uri}, MLflow run {run_id}"
        try:
            # By its address: asked for by run, MLflow keeps to itself what went wrong.
            address = f"{self._address(run_id)}/{path}"
            landed = Path(download_artifacts(artifact_uri=address, dst_path=str(into), tracking_uri=self._uri))
        except NumpruneError:
            raise
        except Exception as error:
            failed = "; ".join(f"{file}: {reason}" for file, reason in _FAILED.findall(str(error)))
            if failed:
                raise RegistryError(
                    f"{where}: cannot be downloaded: {without_secrets(failed)}. Try again; if it fails again, restore "
                    "the file from the backup of the server's store"
                ) from None
            with speaking(f"{where}, {path}"):
                raise
        if not landed.exists():  # what is not there is, to MLflow, an empty folder
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
        """Nothing: a client cannot delete files; `mlflow gc` on the server does, once the run is deleted."""


def require_shared(location: str, where: str, remedy: str) -> None:
    """Raises RegistryError when a server's artifact location is a local folder.

    Args:
        where: whose location it is, for the message.
        remedy: for the message.
    """
    scheme = urlsplit(location).scheme
    if len(scheme) < 2 or scheme == "file":  # one letter is a drive of Windows
        raise RegistryError(
            f"{where}: keeps artifacts in {location}, a local folder: every client would write to its own disk and "
            f"read from there; {remedy}"
        )


@contextmanager
def calling(folder: Path, name: str) -> Iterator[Path]:
    """A temporary folder that errors are to call by a name that means something to the reader."""
    try:
        yield folder
    except IntegrityError as error:
        raise IntegrityError(str(error).replace(str(folder), name)) from None


def require_digest(found: Manifest, digest: str, where: Path | str) -> None:
    """Raises IntegrityError unless the manifest is the one that was published."""
    if found.digest != digest:
        raise IntegrityError(f"{where}: {manifest.FILE_NAME} has the digest {found.digest}, but {digest} was published")
