"""The registry side of deployment, which imports MLflow and the tensor libraries."""

from pathlib import Path
from typing import Any

from numprune.errors import IntegrityError
from numprune.flows import promotion, summary
from numprune.serving import deployment, registry, report
from numprune.serving.deployment import Deployment
from numprune.serving.registry import Registry
from numprune.serving.rollout.state import Place


def prepare(workspace: Path, uri: str | None, reference: str) -> Deployment:
    """Prepare a release for serving: see `deployment.prepare`."""
    return deployment.prepare(_open(workspace, uri), reference, workspace)


def prepare_previous(workspace: Path, uri: str | None, name: str) -> Deployment:
    """Prepare the previous production version for serving."""
    opened = _open(workspace, uri)
    return deployment.prepare(opened, registry.before_production(opened, name).reference, workspace)


def move_back(workspace: Path, uri: str | None, reference: str) -> None:
    """Move `production` back to the previous version, which must be `reference`. Raises IntegrityError."""
    opened = _open(workspace, uri)
    name = registry.parse(reference).name
    before = registry.before_production(opened, name).reference
    if before != reference:
        raise IntegrityError(
            f"{name}: production was moved in the meantime: the previous version is {before}, not {reference}"
        )
    registry.rollback(opened, name)


def verify(workspace: Path, uri: str | None, reference: str) -> dict[str, Any]:
    """Verify every file of a version and return what a person needs to decide; a bare name means its candidate.

    Raises InputError, IntegrityError.
    """
    opened = _open(workspace, uri)
    wanted = reference if "@" in reference or "/" in reference else f"{reference}@{registry.CANDIDATE}"
    version = registry.verify(opened, wanted)
    shown = registry.show(opened, version.reference)
    lines = [f"{version.reference}: {version.verdict}", *summary.of_report(shown.report)]
    return {
        "reference": version.reference,
        "name": version.name,
        "digest": version.digest,
        "in_production": registry.PRODUCTION in version.aliases,
        "summary": "\n".join(lines),
        "page": report.markdown(shown.report),
    }


def promote(workspace: Path, uri: str | None, reference: str, digest: str, to_serve: bool) -> str | None:
    """Put the version with this digest into production; return the previous version's reference.

    `to_serve`: it will also be served here, and `serves` or `take_back` will follow. A version that a killed run
    promoted and never served does not count as the previous one.

    Raises InputError, IntegrityError (damaged, another digest, or its verdict is not `pass`).
    """
    opened = _open(workspace, uri)
    name = registry.parse(reference).name
    found = [one.reference for one in registry.list_versions(opened, name) if registry.PRODUCTION in one.aliases]
    before = found[0] if found else None
    version = registry.verify(opened, reference)
    if version.digest != digest:
        raise IntegrityError(f"{reference}: has the digest {version.digest}, but {digest} was approved")
    if to_serve:
        before = promotion.begin(Place(workspace, name), reference, before)
    registry.promote(opened, reference)
    return before


def serves(workspace: Path, reference: str) -> None:
    """Confirm that the promoted version serves."""
    promotion.end(Place(workspace, registry.parse(reference).name))


def take_back(workspace: Path, uri: str | None, reference: str, previous: str | None) -> None:
    """Undo `promote`, which returned `previous`: make that production again, regardless of killed runs in between."""
    opened = _open(workspace, uri)
    current: str | None = reference
    while current is not None and current != previous:
        version = registry.take_back(opened, current)
        current = version.reference if version else None
    promotion.end(Place(workspace, registry.parse(reference).name))


def _open(workspace: Path, uri: str | None) -> Registry:
    """The registry of a recipe or command line: None and "workspace" mean the workspace's own."""
    return registry.open_registry(None if uri == "workspace" else uri, workspace)
