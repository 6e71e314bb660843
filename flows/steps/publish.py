"""Publishes a release."""

from pathlib import Path

from numprune.flows.names import CHECKPOINT
from numprune.serving import registry


def publish(workspace: Path, uri: str, release: Path, name: str) -> str:
    """Publish a release and return its reference, NAME/VERSION, the same if repeated. Raises NumpruneError."""
    audit(release)
    opened = registry.open_registry(None if uri == "workspace" else uri, workspace)
    return registry.publish(opened, release, name).reference


def audit(release: Path) -> None:
    """Raises IntegrityError naming the tensor if one contradicts the configuration, or contains NaN or infinity.

    Digests do not cover this, and vLLM truncates oversized weights without an error.
    """
    from numprune.export import checkpoint  # the tensor libraries

    if (release / CHECKPOINT).is_dir():  # publishing refuses a release without it
        checkpoint.check_finite(checkpoint.audit(release / CHECKPOINT))
