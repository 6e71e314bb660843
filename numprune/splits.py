"""How a ratio is split between attention and MLPs where every layer gets the same sizes: the pairs that meet it.

KV groups are coarse: one of every layer can be a tenth of the prunable parameters and more. Several pairs of sizes meet
a ratio equally well, and what they cost the model can differ severalfold, so they are priced by the blocks' error
curves (curves.py), which are taken to add up.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

from torch import Tensor

from numprune.anatomy import Anatomy
from numprune.budget import measure
from numprune.errors import InputError
from numprune.target import Counts, nearest

Errors = Mapping[str, Tensor]  # block name -> (units + 1,), by units removed

_ALIKE = 1.1  # prices closer than this do not tell two splits apart: one of 4 % less was measured to lose more


@dataclass(frozen=True)
class Split:
    """The sizes of every layer.

    Attributes:
        kv_groups: kept.
        mlp_channels: kept, an allowed count.
        exact_channels: that would meet the ratio exactly, within 0 and the channels there are.
    """

    kv_groups: int
    mlp_channels: int
    exact_channels: float

    def units(self, anatomy: Anatomy) -> dict[str, int]:
        """Return the units kept by block name."""
        return {
            block.name: self.kv_groups if block.kind == "attention" else self.mlp_channels for block in anatomy.blocks
        }

    def price(self, anatomy: Anatomy, errors: Errors) -> float:
        """Return what the split costs, in the unit of `errors`.

        The MLPs are priced at `exact_channels`, between two counts in proportion: else rounding to the alignment would
        favour the split that removes least.
        """
        return math.fsum(
            float(errors[block.name][block.units - self.kv_groups])
            if block.kind == "attention"
            else _interpolated(errors[block.name], block.units - self.exact_channels)
            for block in anatomy.blocks
        )


def splits_meeting(anatomy: Anatomy, ratio: float, allowed: Counts) -> list[Split]:
    """Return the splits that meet `ratio` to within half a step of the MLPs' allowed counts.

    There is at most one for each number of KV groups. The first takes most nearly the same share of attention as of the
    MLPs.

    Raises:
        InputError: the layers differ, or no split meets the ratio; names the nearest ratios that some split meets.
    """
    if not anatomy.is_uniform:
        raise InputError(
            "the model's layers differ already; uniform allocation needs equal ones (use --allocation error or global)"
        )
    attention, mlp = anatomy.of_kind("attention"), anatomy.of_kind("mlp")
    groups, widths = ([count for count in allowed[blocks[0].name] if count] for blocks in (attention, mlp))
    group_cost, channel_cost = (sum(block.parameters_per_unit for block in blocks) for blocks in (attention, mlp))
    whole = measure(anatomy).prunable_parameters
    step = max((after - before for before, after in pairwise(widths)), default=1)
    splits = []
    for kept in sorted(groups, key=lambda kept: (abs(kept - (1 - ratio) * attention[0].units), -kept)):
        exact = ((1 - ratio) * whole - kept * group_cost) / channel_cost
        if widths[0] - step / 2 <= exact <= widths[-1] + step / 2:
            splits.append(Split(kept, nearest(widths, exact), min(max(exact, 0.0), mlp[0].units)))
    if not splits:
        reached = [1 - (kept * group_cost + width * channel_cost) / whole for kept, width in product(groups, widths)]
        raise InputError(
            f"uniform allocation cannot remove {ratio} of the prunable parameters: one KV group of every layer is "
            f"{group_cost / whole:.3f} of them, more than the MLPs can make up for; {_nearest_ratios(reached, ratio)}"
        )
    return splits


def priced(splits: Sequence[Split], anatomy: Anatomy, errors: Errors) -> dict[Split, float]:
    """Return the splits with their prices: first the one to choose, then the others, the cheapest first.

    It is the earliest of `splits` that costs at most a tenth more than the cheapest.
    """
    prices = {split: split.price(anatomy, errors) for split in splits}
    limit = _ALIKE * min(prices.values())
    chosen = next(split for split, price in prices.items() if price <= limit)
    return dict(sorted(prices.items(), key=lambda item: (item[0] != chosen, item[1])))


def _nearest_ratios(reached: Sequence[float], ratio: float) -> str:
    below, above = [r for r in reached if r < ratio], [r for r in reached if r > ratio]
    ratios = " or ".join([f"{found:.3f}" for found in (max(below, default=None), min(above, default=None)) if found])
    return f"choose ratio {ratios}, or allocation error"


def _interpolated(curve: Tensor, place: float) -> float:
    below = math.floor(place)
    low, high = float(curve[below]), float(curve[min(below + 1, len(curve) - 1)])
    return low + (place - below) * (high - low)
