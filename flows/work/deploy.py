"""What deploying asks of the registry, which brings MLflow and the tensor libraries along."""

from pathlib import Path

from numprune.errors import IntegrityError
from numprune.serving import deployment, registry
from numprune.serving.deployment import Deployment


def prepare(workspace: Path, uri: str | None, reference: str) -> Deployment:
    """A release ready to be served: see `deployment.prepare`."""
    return deployment.prepare(registry.open_registry(uri, workspace), reference, workspace)


def prepare_previous(workspace: Path, uri: str | None, name: str) -> Deployment:
    """The version that was in production before, ready to be served."""
    opened = registry.open_registry(uri, workspace)
    return deployment.prepare(opened, registry.before_production(opened, name).reference, workspace)


def move_back(workspace: Path, uri: str | None, reference: str) -> None:
    """Move `production` back to the version before, which must be `reference`. Raises IntegrityError."""
    opened = registry.open_registry(uri, workspace)
    name = registry.parse(reference).name
    before = registry.before_production(opened, name).reference
    if before != reference:
        raise IntegrityError(f"{name}: somebody moved production meanwhile: before it is {before}, not {reference}")
    registry.rollback(opened, name)
