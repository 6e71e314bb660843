"""The bodies of the stages that compare samples of an image generator with real images."""

from pathlib import Path

from numprune.flows.stages import Artifact, Text
from numprune.flows.steps.results import ImageFeatures, ImageMetrics


def make_real_features(
    out: Path, *, model: Artifact, images: Text, decoder: Text | None, network: Text, device: str
) -> ImageFeatures:
    """Write what the network says of real images, which must be of the size of the pictures of `model`."""
    import torch

    from numprune.flows.steps import fid
    from numprune.flows.steps.generators import same_file

    drawn_by = same_file(decoder, "evaluate.decoder") if decoder else None
    reads = same_file(network, "evaluate.fid_network")
    return fid.real_features(out, model.path, list(images.source), drawn_by, reads, torch.device(device))


def make_sampled_features(
    out: Path,
    *,
    model: Artifact,
    colours: Artifact,
    samples: int,
    guidance: float,
    decoder: Text | None,
    network: Text,
    device: str,
) -> ImageFeatures:
    """Write what the network says of images drawn from `model`; `colours`: the model whose folder may have those."""
    import torch

    from numprune.flows.steps import fid
    from numprune.flows.steps.generators import same_file

    drawn_by = same_file(decoder, "evaluate.decoder") if decoder else None
    reads, where = same_file(network, "evaluate.fid_network"), torch.device(device)
    return fid.sampled_features(out, model.path, colours.path, samples, guidance, drawn_by, reads, where)


def make_image_metrics(
    out: Path, *, real: Artifact, baseline: Artifact, candidate: Artifact, network: str
) -> ImageMetrics:
    """Compare both models' samples with real images; `network`: its name for the report."""
    from numprune.flows.steps import fid

    return fid.metrics(real.path, baseline.path, candidate.path, network)
