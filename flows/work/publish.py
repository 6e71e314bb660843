"""A release into the registry."""

from pathlib import Path

from numprune.serving import registry


def publish(workspace: Path, uri: str, release: Path, name: str) -> str:
    """Publish a release and return its reference, NAME/VERSION; again, and it is the same one. Raises NumpruneError."""
    opened = registry.open_registry(None if uri == "workspace" else uri, workspace)
    return registry.publish(opened, release, name).reference
