"""A release into the registry."""

from pathlib import Path

from numprune.flows.bundle import CHECKPOINT
from numprune.serving import registry


def publish(workspace: Path, uri: str, release: Path, name: str) -> str:
    """Publish a release and return its reference, NAME/VERSION; again, and it is the same one. Raises NumpruneError."""
    audit(release)
    opened = registry.open_registry(None if uri == "workspace" else uri, workspace)
    return registry.publish(opened, release, name).reference


def audit(release: Path) -> None:
    """Raises IntegrityError, naming the tensor, when one is not what the configuration says, or holds NaN or infinity.

    Digests do not say that: vLLM cuts weights that are too large to size without an error.
    """
    from numprune.export import checkpoint  # the tensor libraries

    if (release / CHECKPOINT).is_dir():  # publishing itself refuses a release without
        checkpoint.check_finite(checkpoint.audit(release / CHECKPOINT))
