"""The section `images` of a report: samples of an image generator and of the dense model, with the same noise."""

import base64
import io
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from numprune.anatomy import code_vocabulary
from numprune.corpus import TokenRows
from numprune.export.checkpoint import load_model
from numprune.export.decoders import load_decoder
from numprune.image_quality import code_divergence, guided_divergence
from numprune.placement import place
from numprune.sampling import sample
from numprune.serving.report import MAXIMUM_SAMPLES

_ROWS = 64  # on which guided distributions are compared
_SEED = 0
# Of the contact sheet: pairs in a row, and pixels: small images are enlarged to fit `_TILE`, large ones reduced to
# `_REDUCED`, so that no sheet exceeds what a report takes.
_COLUMNS, _TILE, _REDUCED, _GAP = 10, 48, 80, 4


def compare_images(
    candidate: Path,
    baseline: Path,
    rows: TokenRows,
    samples: int,
    guidance: float,
    decoder: Path | None,
    device: torch.device,
) -> dict[str, Any]:
    """Sample from both models and compare their guided distributions on the first rows; see serving.report.Images.

    Args:
        rows: the held-out images.
        samples: number of images from each model.
        guidance: scale of classifier-free guidance, which models without classes do not have.
        decoder: as for `load_decoder`.

    Raises InputError, IntegrityError.
    """
    model, dense = (place(load_model(folder), device, models=2) for folder in (candidate, baseline))
    codes = code_vocabulary(dense.config)
    assert codes is not None
    labels = [*islice(cycle(range(codes.classes) if codes.classes else [None]), samples)]
    scale = guidance if codes.classes else 1.0
    theirs, again = (sample(dense, labels, guidance=scale, seed=seed) for seed in (_SEED, _SEED + 1))
    ours = sample(model, labels, guidance=scale, seed=_SEED)
    kl = None
    if codes.classes and rows.labels is not None:
        longest = max(map(len, rows.rows))
        held_out = torch.stack([row for row in rows.rows if len(row) == longest][:_ROWS])
        kl = guided_divergence(model, dense, held_out, scale)
    draws = load_decoder(baseline, dense.config, decoder, device)
    theirs_shown, ours_shown = theirs[:MAXIMUM_SAMPLES], ours[:MAXIMUM_SAMPLES]
    return {
        "samples": samples,
        "guidance": scale,
        "guided_kl_nats_per_code": kl,
        "code_divergence_nats": code_divergence(ours, theirs, codes.codes),
        "code_divergence_of_dense_nats": code_divergence(again, theirs, codes.codes),
        "sheet": None if draws is None else contact_sheet(draws.pictures(theirs_shown), draws.pictures(ours_shown)),
    }


def contact_sheet(baseline: Tensor, candidate: Tensor) -> str:
    """Return a PNG in base64: images of the baseline, and below each the candidate's.

    Args:
        baseline, candidate: (n, 3, side, side) uint8. Small images are enlarged, large ones reduced.
    """
    side = baseline.shape[-1]
    count = min(len(baseline), MAXIMUM_SAMPLES)
    columns = min(count, _COLUMNS)
    tile = min(side, _REDUCED) if side > _TILE else _TILE // side * side
    rows = -(-count // columns)
    height, width = rows * (2 * tile + 3 * _GAP), columns * (tile + _GAP) - _GAP
    sheet = Image.new("RGB", (width, height - 2 * _GAP), "white")
    for index in range(count):
        row, column = divmod(index, columns)
        left, top = column * (tile + _GAP), row * (2 * tile + 3 * _GAP)
        for below, images in enumerate((baseline, candidate)):
            picture = Image.fromarray(images[index].permute(1, 2, 0).numpy())
            sized = picture.resize((tile, tile), Image.Resampling.NEAREST if tile >= side else Image.Resampling.LANCZOS)
            sheet.paste(sized, (left, top + below * (tile + _GAP)))
    written = io.BytesIO()
    sheet.save(written, "png", optimize=True)
    return base64.b64encode(written.getvalue()).decode()
