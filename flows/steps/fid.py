"""FID, KID and the Inception Score of both models' samples, by a network of the user's own."""

from collections.abc import Sequence
from dataclasses import asdict
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from numprune.anatomy import code_vocabulary
from numprune.bootstrap import Estimate
from numprune.errors import InputError
from numprune.export.checkpoint import load_model, read_config
from numprune.export.decoders import load_decoder
from numprune.export.feature_networks import Features, features_of, load_network
from numprune.flows.stages import Artifact, read_facts
from numprune.flows.steps.results import ImageFeatures, ImageMetrics
from numprune.frechet import compare_frechet
from numprune.images import rgb
from numprune.inception_score import compare_scores
from numprune.kernel_distance import compare_kernels
from numprune.pictures import Picture, read_pictures
from numprune.placement import place
from numprune.progress import progress
from numprune.sampling import sample
from numprune.serving.report import Quality

_FILE = "features.safetensors"
_CHUNK = 256  # images decoded and read at a time
_SEED = 0


def real_features(
    out: Path, model: Path, images: Sequence[str], decoder: Path | None, network: Path, device: torch.device
) -> ImageFeatures:
    """Write the features of real images. Raises InputError, also for images of another size than the model's."""
    draws = load_decoder(model, read_config(model), decoder, torch.device("meta"))
    assert draws is not None
    reads, pictures = load_network(network, device), read_pictures(images)
    found = []
    for start in progress(range(0, len(pictures), _CHUNK), "read", "batch of images"):
        try:
            read = [sized(picture, draws.side) for picture in pictures[start : start + _CHUNK]]
        except InputError as error:
            raise InputError(f"evaluate.fid_images: {error}") from None
        found.append(features_of(reads, torch.stack(read)))
    return _write(out, found)


def sized(picture: Picture, side: int) -> Tensor:
    """Return an image, (3, side, side) uint8. Raises InputError if it has another size."""
    found = rgb(picture)
    if found.shape[1:] != (side, side):
        raise InputError(
            f"image {picture.name} has {found.shape[2]} x {found.shape[1]} pixels, but the model's "
            f"images have {side} x {side}; scale and crop the images as those that it was trained on"
        )
    return found


def sampled_features(
    out: Path,
    model: Path,
    colours: Path,
    samples: int,
    guidance: float,
    decoder: Path | None,
    network: Path,
    device: torch.device,
) -> ImageFeatures:
    """Draw images, as many of each class, and write their features. Raises InputError, IntegrityError."""
    loaded = place(load_model(model), device)
    codes = code_vocabulary(loaded.config)
    assert codes is not None
    labels = [*islice(cycle(range(codes.classes) if codes.classes else [None]), samples)]
    drawn = sample(loaded, labels, guidance=guidance if codes.classes else 1.0, seed=_SEED)
    del loaded
    draws = load_decoder(colours, read_config(model), decoder, device)
    assert draws is not None
    reads = load_network(network, device)
    return _write(out, [features_of(reads, draws.pictures(part)) for part in drawn.split(_CHUNK)])


def _write(out: Path, found: Sequence[Features]) -> ImageFeatures:
    tensors = {"features": torch.cat([part.features for part in found])}
    classes = [part.probabilities for part in found if part.probabilities is not None]
    if classes:
        tensors["probabilities"] = torch.cat(classes)
    save_file(tensors, out / _FILE)
    images, length = tensors["features"].shape
    return ImageFeatures(images, length, classes[0].shape[1] if classes else 0)


def metrics(real: Path, baseline: Path, candidate: Path, network: str) -> ImageMetrics:
    """Compare the features in the folders of three stages."""
    images, *sides = (load_file(folder / _FILE) for folder in (real, baseline, candidate))
    reference, first, second = (found["features"] for found in (images, *sides))
    frechet = compare_frechet(reference, first, second)
    scores = compare_scores(*(side["probabilities"] for side in sides)) if "probabilities" in sides[0] else None
    return ImageMetrics(
        fid={
            **_estimates(frechet[0].extrapolated, frechet[1].extrapolated, frechet[2]),
            "published": {"baseline": frechet[0].published, "candidate": frechet[1].published},
        },
        kid=_estimates(*compare_kernels(reference, first, second)),
        inception_score=scores
        and {
            **_estimates(scores[0].extrapolated, scores[1].extrapolated, scores[2]),
            "published": {"baseline": scores[0].published, "candidate": scores[1].published},
            "deviation": {"baseline": scores[0].deviation, "candidate": scores[1].deviation},
        },
        network={
            "file": network,
            "features": reference.shape[1],
            "samples": len(first),
            "real_images": len(reference),
        },
    )


def _estimates(baseline: Estimate, candidate: Estimate, delta: Estimate) -> dict[str, Any]:
    return {"baseline": asdict(baseline), "candidate": asdict(candidate), "delta": asdict(delta)}


def with_images(quality: Quality, stage: Artifact | None) -> Quality:
    """Return the quality with what the stage found; None: unchanged."""
    if stage is None or quality.images is None:
        return quality
    data = quality.model_dump()
    data["images"].update(asdict(read_facts(stage.path, ImageMetrics)))
    return Quality.model_validate(data)
