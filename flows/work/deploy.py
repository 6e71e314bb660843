"""What deploying asks of the registry, which brings MLflow and the tensor libraries along."""

from pathlib import Path

from numprune.serving import deployment, registry
from numprune.serving.deployment import Deployment


def prepare(workspace: Path, uri: str | None, reference: str) -> Deployment:
    """A release ready to be served: see `deployment.prepare`."""
    return deployment.prepare(registry.open_registry(uri, workspace), reference, workspace)
