"""Pictures of where a classifier's heads look in held-out images: those kept and removed, and the pruned model's."""

import base64
import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from numprune.anatomy import patch_grid
from numprune.blocks import Anatomy
from numprune.corpus import TokenRows
from numprune.families import FAMILIES
from numprune.flows.steps.attention import layers_of
from numprune.plans import PLAN_FILE, Plan, read_plan
from numprune.probing import attention_maps, kept_heads
from numprune.renumber import layers_left
from numprune.serving.report import AttentionMaps
from numprune.tasks.image_classification import ImageClassification

_IMAGES, _LAYERS = 4, 6
_TILE, _GAP = 40, 4  # pixels
_LEVELS = 64  # of attention: fewer make smaller files
_DARK, _NONE = np.array([31, 78, 140]), 235  # the colour of the most attention; the grey of a missing square


def draw_maps(
    base: Path, pruned: Path, rows: TokenRows, device: torch.device, *, stream: bool, scratch: Path
) -> AttentionMaps:
    """Return the maps of a few of the images, evenly chosen, in a few of the layers with attention.

    Args:
        base, pruned: checkpoints of image classifiers, the latter with its plan.
        rows: held-out images.
        stream: one layer in memory at a time, with hidden states in `scratch`.
    """
    chosen = _spread(len(rows.rows), _IMAGES)
    images = torch.stack([rows.rows[index] for index in chosen])
    before, after = (layers_of(folder, device, stream=stream, scratch=scratch) for folder in (base, pruned))
    dense, left = attention_maps(before, images), attention_maps(after, images)
    plan, task = read_plan(pruned / PLAN_FILE), before.task
    assert isinstance(task, ImageClassification)
    names = _renamed(before.anatomy, plan)
    shown = [list(dense)[index] for index in _spread(len(dense), _LAYERS)]
    grids = {block.name: block.stage.grid for block in before.anatomy.blocks if block.stage}
    bands = []
    for number, image in enumerate(images):
        columns = [_picture(task, image)]
        for name in shown:
            heads = dense[name][number]
            kept = torch.from_numpy(kept_heads(plan.blocks[name], len(heads)))
            own = left[names[name]][number] if names.get(name) in left else heads[:0]
            grid = grids.get(name) or patch_grid(before.config)
            columns.append(_column([heads[kept], heads[~kept], own], grid))
        bands.append(_beside(columns, axis=1))
    layers = tuple(int(name.split(".")[1]) for name in shown)
    found = tuple(rows.names[rows.document[index]] for index in chosen)
    patches = FAMILIES[before.anatomy.family].patches
    return AttentionMaps(
        by="class token" if patches and patches.tokens else "patches",
        images=found,
        layers=layers,
        png=_png(_beside(bands, axis=0, gap=3 * _GAP)),
    )


def _spread(count: int, most: int) -> list[int]:
    """Return up to `most` indices below `count`, the first and the last and evenly spaced ones between them."""
    return sorted({round(place) for place in np.linspace(0, count - 1, min(count, most))})


def _renamed(anatomy: Anatomy, plan: Plan) -> dict[str, str]:
    """Return the names of the dense model's attention blocks in the pruned one, where layers may be dropped."""
    left = layers_left(anatomy.layers, plan.dropped_layers())
    return {f"layers.{old}.attention": f"layers.{new}.attention" for new, old in enumerate(left)}


def _column(groups: list[Tensor], grid: tuple[int, int]) -> np.ndarray:
    """Return one square below the other, each of the mean over a group of heads (n, P), n = 0: none."""
    means = [group.mean(0) if len(group) else None for group in groups]
    most = max((float(mean.max()) for mean in means if mean is not None), default=0.0) or 1.0
    squares = []
    for mean in means:
        if mean is None:
            squares.append(np.full((_TILE, _TILE, 3), _NONE, np.uint8))
            continue
        share = np.rint(mean.view(grid).numpy() / most * _LEVELS)[..., None] / _LEVELS
        squares.append(_scaled(np.rint(255 * (1 - share) + _DARK * share).astype(np.uint8)))
    return _beside(squares, axis=0)


def _picture(task: ImageClassification, pixels: Tensor) -> np.ndarray:
    """Return the image above two empty squares."""
    square = _scaled(np.array(task.processor.picture(pixels).convert("RGB")))
    return _beside([square, *[np.full((_TILE, _TILE, 3), 255, np.uint8)] * 2], axis=0)


def _scaled(pixels: np.ndarray) -> np.ndarray:
    """Return (height, width, 3) uint8 as a square; pixels are not blurred when they become larger."""
    smaller = max(pixels.shape) > _TILE
    how = Image.Resampling.BOX if smaller else Image.Resampling.NEAREST
    return np.array(Image.fromarray(pixels).resize((_TILE, _TILE), how))


def _beside(parts: list[np.ndarray], axis: int, gap: int = _GAP) -> np.ndarray:
    """Return pictures side by side, or one below the other, with white between them."""
    shape = list(parts[0].shape)
    shape[axis] = gap
    white = np.full(shape, 255, np.uint8)
    return np.concatenate([one for part in parts for one in (part, white)][:-1], axis)


def _png(pixels: np.ndarray) -> str:
    written = io.BytesIO()
    Image.fromarray(pixels).save(written, "png", optimize=True)
    return base64.b64encode(written.getvalue()).decode()
