"""Shows, verifies and fetches releases from the registry."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from numprune.errors import IntegrityError
from numprune.export import manifest
from numprune.export.manifest import Manifest
from numprune.serving import report as reports
from numprune.serving.registry.artifacts import calling, require_digest
from numprune.serving.registry.connection import Registry
from numprune.serving.registry.model_reference import parse
from numprune.serving.registry.versions import Version, resolve
from numprune.serving.report import Report

KIND = "release"
REPORT = "report.json"
CHECKPOINT = "checkpoint"


@dataclass(frozen=True)
class Shown:
    """A version, its report and its files."""

    version: Version
    report: Report
    files: Mapping[str, int]  # name -> bytes


def show(registry: Registry, reference: str) -> Shown:
    """Show a version; a bare name means production. Only its manifest and report are verified.

    Raises InputError, IntegrityError.
    """
    with reading(registry, reference, [REPORT]) as (version, found, folder):
        report = reports.read(folder / REPORT)
        return Shown(version, report, {name: entry.size for name, entry in found.files.items()})


@contextmanager
def reading(registry: Registry, reference: str, names: Sequence[str]) -> Iterator[tuple[Version, Manifest, Path]]:
    """A version, its manifest, and a folder with at least these files, verified.

    Raises InputError, IntegrityError.
    """
    with registry.speaking():
        version = resolve(registry, parse(reference))
        with registry.artifacts.at(version.run_id, only=[manifest.FILE_NAME, *names]) as folder:
            found = manifest.read(folder)
            require_digest(found, version.digest, version.reference)
            for name in names:
                if name not in found.files or manifest.sha256_file(folder / name) != found.files[name].sha256:
                    raise IntegrityError(f"{folder / name}: not the file that was published")
            yield version, found, folder


def verify(registry: Registry, reference: str) -> Version:
    """Compare every file of a version with what was published; a bare name means production.

    Raises IntegrityError naming the first file that differs, InputError.
    """
    with registry.speaking():
        version = resolve(registry, parse(reference))
        verify_version(registry, version)
        return version


def verify_version(registry: Registry, version: Version) -> Report:
    """`verify` for a resolved version; returns its report."""
    with registry.artifacts.at(version.run_id) as folder:
        require_digest(manifest.read(folder), version.digest, version.reference)
        manifest.verify(folder)
        return reports.read(folder / REPORT)


def fetch(registry: Registry, reference: str, out: Path, *, digest: str | None = None) -> Version:
    """Copy a verified version to `out`, atomically; a bare name means production.

    Args:
        digest: of the expected release. If `out` already holds exactly that release, it is kept, so that a restarted
            init container succeeds.

    Raises InputError (`out` exists, or there is no such version), IntegrityError (a file or the release differs from
        what was published or from `digest`).
    """
    with registry.speaking():
        version = resolve(registry, parse(reference))
        if digest is not None and version.digest != digest:
            raise IntegrityError(f"{version.reference}: its digest is {version.digest}, but {digest} was requested")
        if digest is not None and out.exists():
            require_digest(manifest.verify(out), digest, out)
            return version
        with registry.artifacts.at(version.run_id, only=[manifest.FILE_NAME]) as stored:
            expected = manifest.read(stored)
        require_digest(expected, version.digest, version.reference)
        manifest.sweep(out.parent)
        with (
            manifest.creating(out, kind=expected.kind, parents=expected.parents, facts=expected.facts) as partial,
            calling(partial, version.reference),
        ):
            registry.artifacts.copy(version.run_id, partial)
            require_digest(manifest.verify(partial), version.digest, version.reference)
            (partial / manifest.FILE_NAME).unlink()  # it is written again once the folder is complete
        require_digest(manifest.read(out), version.digest, out)
        return version
