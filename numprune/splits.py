"""Splits of a ratio between attention and MLPs with the same sizes in every layer.

KV groups are coarse: one group of every layer can be a tenth of the prunable parameters or more. Several pairs of sizes
meet a ratio equally well, and their costs can differ severalfold, so they are priced by the blocks' error curves
(curves.py), which are assumed to add up.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product

from torch import Tensor

from numprune.blocks import Anatomy, Block
from numprune.budget import budget_of
from numprune.curves import Errors, error_at
from numprune.errors import InputError
from numprune.slices import Size
from numprune.target import Sizes, nearest

_ALIKE = 1.1  # closer prices do not distinguish two splits: one 4 % cheaper was measured to lose more


@dataclass(frozen=True)
class Split:
    """The sizes of every layer, or of those of the first stage: others have multiples of them.

    Attributes:
        attention: an allowed size.
        mlp_channels: kept; an allowed size.
        exact_channels: the number that would meet the ratio exactly, clipped to the valid range.
    """

    attention: Size
    mlp_channels: int
    exact_channels: float

    def sizes(self, anatomy: Anatomy) -> dict[str, Size]:
        """Return the size that is left of each block, by its name."""
        return {block.name: self._size(block) for block in anatomy.blocks}

    def _size(self, block: Block) -> Size:
        units, members = self.attention if block.kind == "attention" else Size(self.mlp_channels)
        return Size(units * block.multiple, members)

    def price(self, anatomy: Anatomy, errors: Errors) -> float:
        """Return the cost of the split, in the unit of `errors`.

        The MLPs are priced at `exact_channels`, interpolated between two widths: otherwise rounding to the alignment
        would favour the split that removes the least.
        """
        return math.fsum(
            error_at(errors, block, self._size(block))
            if block.kind == "attention"
            else _interpolated(errors[block.name][:, 0], block.units - self.exact_channels * block.multiple)
            for block in anatomy.blocks
        )


def fewest_units(splits: Sequence[Split], block: Block) -> int:
    """Return the smallest number of units that any split keeps of a block."""
    if block.kind == "attention":
        return min(split.attention.units for split in splits) * block.multiple
    most_gone = block.units - min(split.exact_channels for split in splits) * block.multiple
    return max(0, block.units - math.floor(most_gone) - 1)


def require_alike(anatomy: Anatomy) -> None:
    """Raise InputError if the layers differ, which uniform allocation does not support."""
    if not anatomy.is_uniform:
        raise InputError(
            "the model's layers differ already; uniform allocation needs equal ones (use --allocation error or global)"
        )


def splits_meeting(anatomy: Anatomy, ratio: float, allowed: Sizes) -> list[Split]:
    """Return the splits that meet `ratio` to within half a step of the MLPs' allowed widths.

    There is at most one for each attention size. The first is the most even one: it removes the most similar shares of
    attention and MLPs.

    Raises:
        InputError: the layers differ, or no split meets the ratio; names the nearest ratios that some split meets.
    """
    require_alike(anatomy)
    attention, mlp = anatomy.of_kind("attention"), anatomy.of_kind("mlp")
    sizes = [size for size in allowed[attention[0].name] if size.units]
    widths = [size.units for size in allowed[mlp[0].name] if size.units]
    costs = {
        size: sum(block.parameters(Size(size.units * block.multiple, size.members)) for block in attention)
        for size in sizes
    }
    channel_cost = sum(block.parameters_per_unit * block.multiple for block in mlp)
    whole = budget_of(anatomy).prunable_parameters
    of_attention = sum(block.parameters(block.size) for block in attention)
    step = max((after - before for before, after in pairwise(widths)), default=1)

    def unevenness(size: Size) -> tuple[float, int]:
        return round(abs(costs[size] / of_attention - (1 - ratio)), 9), -costs[size]

    splits = []
    for size in sorted(sizes, key=unevenness):
        exact = ((1 - ratio) * whole - costs[size]) / channel_cost
        if widths[0] - step / 2 <= exact <= widths[-1] + step / 2:
            splits.append(Split(size, nearest(widths, exact), min(max(exact, 0.0), mlp[0].units)))
    if not splits:
        group_cost = sum(block.parameters_per_unit * block.multiple for block in attention)
        reached = [1 - (cost + width * channel_cost) / whole for cost, width in product(costs.values(), widths)]
        coarse = f"one KV group of every layer is {group_cost / whole:.3f} of them"
        why = f"{coarse}, more than the MLPs can offset" if len(widths) > 1 else "the MLPs keep their width"
        raise InputError(
            f"uniform allocation cannot remove {ratio} of the prunable parameters: {why}; "
            f"{_nearest_ratios(reached, ratio)}"
        )
    return splits


def priced(splits: Sequence[Split], anatomy: Anatomy, errors: Errors) -> dict[Split, float]:
    """Return the splits with their prices: first the chosen one, then the others, cheapest first.

    The chosen one is the first of `splits` that costs at most 10 % more than the cheapest.
    """
    prices = {split: split.price(anatomy, errors) for split in splits}
    limit = _ALIKE * min(prices.values())
    chosen = next(split for split, price in prices.items() if price <= limit)
    return dict(sorted(prices.items(), key=lambda item: (item[0] != chosen, item[1])))


def _nearest_ratios(reached: Sequence[float], ratio: float) -> str:
    below, above = [r for r in reached if r < ratio], [r for r in reached if r > ratio]
    nearest = [found for found in (max(below, default=None), min(above, default=None)) if found]
    # rounded towards the other sizes: a ratio over the highest, or below the lowest, would be refused
    shown = [(math.floor if found == max(reached) else math.ceil)(found * 1000) / 1000 for found in nearest]
    return f"choose ratio {' or '.join(f'{found:.3f}' for found in shown)}, or allocation error"


def _interpolated(curve: Tensor, place: float) -> float:
    below = math.floor(place)
    low, high = float(curve[below]), float(curve[min(below + 1, len(curve) - 1)])
    return low + (place - below) * (high - low)
