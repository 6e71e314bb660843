"""Models in stages: each has its own hidden size, heads and tokens, and patches are merged between two of them (Swin).

Layers are numbered through all stages. torch is not needed.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from numprune.errors import InputError
from numprune.families.family import Family, Stages
from numprune.fields import is_size, pair

_MOST = 16  # stages: each halves the grid


class Stage(NamedTuple):
    """One stage.

    Attributes:
        first: number of its first layer.
        depth: how many layers it has.
        hidden_size: of its layers.
        grid: its tokens, height and width.
        multiple: its hidden size in those of the first stage.
    """

    first: int
    depth: int
    hidden_size: int
    grid: tuple[int, int]
    multiple: int


class Place(NamedTuple):
    """The place of a layer: the number of its stage, the stage, and the layer's number in it."""

    number: int
    stage: Stage
    inside: int


def read_stages(stages: Stages, config: Any) -> tuple[Stage, ...]:
    """Return the stages of a configuration.

    Raises:
        InputError: sizes are no positive whole numbers, contradict each other, or a window exceeds a stage's grid.
    """
    depths, heads = (_sizes(config, field) for field in (stages.depths, stages.heads))
    width, window, ratio = (getattr(config, field) for field in (stages.width, stages.window, stages.ratio))
    for field, value in ((stages.width, width), (stages.window, window)):
        if not is_size(value):
            raise InputError(f"{field}={str(value)[:80]}; it must be a positive integer")
    if not isinstance(ratio, int | float) or isinstance(ratio, bool) or not 0 < ratio < 2**16:
        raise InputError(f"{stages.ratio}={str(ratio)[:80]}; it must be a positive number")
    if len(heads) != len(depths):
        raise InputError(
            f"{stages.heads} has {len(heads)} entries and {stages.depths} has {len(depths)}; each needs one per stage"
        )
    found, first, grid = [], 0, grid_of(config)
    for number, (depth, count) in enumerate(zip(depths, heads, strict=True)):
        hidden = width * 2**number
        if hidden % count:
            raise InputError(f"stage {number}: {stages.heads}={count} does not divide its hidden size {hidden}")
        if window > min(grid):
            raise InputError(
                f"{stages.window}={window}: stage {number} has {grid[0]} x {grid[1]} tokens, fewer than a window; "
                "the model itself cannot read such images"
            )
        found.append(Stage(first, depth, hidden, grid, 2**number))
        first, grid = first + depth, (math.ceil(grid[0] / 2), math.ceil(grid[1] / 2))
    return tuple(found)


def _sizes(config: Any, field: str) -> list[int]:
    found: Any = getattr(config, field, None)
    if not isinstance(found, list | tuple) or not 0 < len(found) <= _MOST or not all(map(is_size, found)):
        raise InputError(f"{field}={str(found)[:80]}; it must be a list of 1 to {_MOST} positive integers")
    return list(found)


def grid_of(config: Any) -> tuple[int, int]:
    """Return the patches of an image, height and width; incomplete ones are padded. Raises InputError."""
    image, patch = pair(config, "image_size"), pair(config, "patch_size")
    return math.ceil(image[0] / patch[0]), math.ceil(image[1] / patch[1])


def places(stages: Stages, config: Any) -> Iterator[Place]:
    """Yield the place of each layer, first layer first. Raises InputError like `read_stages`."""
    for number, stage in enumerate(read_stages(stages, config)):
        for inside in range(stage.depth):
            yield Place(number, stage, inside)


def path_of(stages: Stages, place: Place) -> str:
    """Return the path of a layer inside the family's `layers`."""
    return f"{place.number}.{stages.layers}.{place.inside}"


def stock_sizes(family: Family, stages: Stages, config: Any, place: Place) -> dict[str, int]:
    """Return the fields of a layer of a stock model, by their names in a per-layer configuration."""
    heads = getattr(config, stages.heads)[place.number]
    return {family.heads: heads, family.width: int(getattr(config, stages.ratio) * place.stage.hidden_size)}


def ratio_of(width: int, stages: Stages, config: Any) -> float:
    """Return the ratio from which transformers computes MLPs of this width in the first stage, and multiples after it.

    It rounds ratio * hidden size down, and the quotient of two integers may lie just below.
    """
    hidden = getattr(config, stages.width)
    ratio = width / hidden
    return ratio if int(ratio * hidden) == width else math.nextafter(ratio, math.inf)
