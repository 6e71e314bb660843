"""The section `images` of a report: samples of an image generator and of the dense model, with the same noise."""

import base64
import io
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from numprune.anatomy import code_vocabulary
from numprune.corpus import TokenRows
from numprune.errors import InputError
from numprune.export import files
from numprune.export.checkpoint import load_model
from numprune.image_quality import code_divergence, guided_divergence
from numprune.sampling import sample
from numprune.serving.report import MAXIMUM_SAMPLES

PALETTE = "preprocessor_config.json"  # of the model folder, with the colour of each code in `clusters`
_ROWS = 64  # on which guided distributions are compared
_SEED = 0
_COLUMNS, _TILE, _GAP = 10, 48, 4  # of the contact sheet: pairs in a row, and pixels


def compare_images(
    candidate: Path, baseline: Path, rows: TokenRows, samples: int, guidance: float, device: torch.device
) -> dict[str, Any]:
    """Sample from both models and compare their guided distributions on the first rows; see serving.report.Images.

    Args:
        rows: the held-out images.
        samples: number of images from each model.
        guidance: scale of classifier-free guidance, which models without classes do not have.

    Raises InputError, IntegrityError.
    """
    model, dense = (load_model(folder).to(device) for folder in (candidate, baseline))
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
    colours = palette(baseline, codes.codes)
    return {
        "samples": samples,
        "guidance": scale,
        "guided_kl_nats_per_code": kl,
        "code_divergence_nats": code_divergence(ours, theirs, codes.codes),
        "code_divergence_of_dense_nats": code_divergence(again, theirs, codes.codes),
        "sheet": None if colours is None else contact_sheet(theirs, ours, colours),
    }


def palette(folder: Path, codes: int) -> np.ndarray | None:
    """Return the colour of each code, (codes, 3) uint8; None if the model folder has none.

    `clusters` in preprocessor_config.json are colours from -1 to 1, as in ImageGPT. Raises InputError.
    """
    path = folder / PALETTE
    found = files.read_object(path).get("clusters") if path.is_file() else None
    if found is None:
        return None
    try:
        clusters = np.array(found, dtype=np.float64)
    except (TypeError, ValueError):
        clusters = np.empty(0)
    if clusters.shape != (codes, 3) or not (np.abs(clusters) <= 1).all():
        raise InputError(f"{path}: clusters must be {codes} colours of three numbers from -1 to 1")
    return np.rint(127.5 * (clusters + 1)).astype(np.uint8)


def contact_sheet(baseline: Tensor, candidate: Tensor, colours: np.ndarray) -> str | None:
    """Return a PNG in base64: images of the baseline, and below each the candidate's; None if they are not square.

    Args:
        baseline, candidate: (n, L) codes.
        colours: as `palette` returns them.
    """
    side = int(baseline.shape[1] ** 0.5)
    if side * side != baseline.shape[1]:
        return None
    count = min(len(baseline), MAXIMUM_SAMPLES)
    columns = min(count, _COLUMNS)
    zoom = max(1, _TILE // side)
    tile = side * zoom
    rows = -(-count // columns)
    height, width = rows * (2 * tile + 3 * _GAP), columns * (tile + _GAP) - _GAP
    sheet = np.full((height - 2 * _GAP, width, 3), 255, np.uint8)
    for index in range(count):
        row, column = divmod(index, columns)
        left, top = column * (tile + _GAP), row * (2 * tile + 3 * _GAP)
        for below, images in enumerate((baseline, candidate)):
            pixels = colours[images[index].numpy()].reshape(side, side, 3).repeat(zoom, 0).repeat(zoom, 1)
            start = top + below * (tile + _GAP)
            sheet[start : start + tile, left : left + tile] = pixels
    written = io.BytesIO()
    Image.fromarray(sheet).save(written, "png", optimize=True)
    return base64.b64encode(written.getvalue()).decode()
