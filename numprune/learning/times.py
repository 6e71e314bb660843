"""Measured times as the cost of masks: between two measured sizes of a block, its time is interpolated.

Only training interpolates; the sizes that masks are rounded to are measured ones.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from numprune.blocks import Anatomy, Block
from numprune.learning.masks import Masks
from numprune.slices import Size
from numprune.target import Sizes
from numprune.time_budget import TimeBudget


def time_of_leaf(budget: TimeBudget, block: Block) -> float:
    """Return the nanoseconds of one member of one unit: the mean slope from the smallest measured size to the block's.

    0 if the smallest is not faster.
    """
    sizes = [size for size in budget.sizes(block) if _leaves(size) < _leaves(block.size)]
    if not sizes:
        return 0.0
    smallest = min(sizes, key=_leaves)
    saved = budget.cost(block, block.size) - budget.cost(block, smallest)
    return max(0.0, saved / (_leaves(block.size) - _leaves(smallest)))


@dataclass(frozen=True)
class TimedShare:
    """The kept share of the blocks' time.

    A block's time is a function of its expected share of leaves (units, or their members if these have masks): linear
    between measured sizes, and constant below the smallest. Larger sizes can be faster than smaller ones, and then
    replace them, so that the function never falls; its gradient is the local slope.

    Attributes:
        curves: by block name, the shares of leaves (P,) of its sizes, ascending, and their part of the whole time (P,).
        fixed: the part of blocks without masks.
    """

    curves: Mapping[str, tuple[Tensor, Tensor]]
    fixed: float

    @classmethod
    def of(cls, budget: TimeBudget, anatomy: Anatomy, masks: Masks, allowed: Sizes) -> "TimedShare":
        """Return the share that the masks of a model keep; `allowed`: measured sizes of each block."""
        times = {block.name: budget.cost(block, block.size) for block in anatomy.blocks}
        whole = sum(times.values())
        curves = {}
        for block in masks.blocks:
            shares, parts = _curve(budget, block, allowed[block.name], whole)
            curves[block.name] = shares.to(masks.costs), parts.to(masks.costs)
        fixed = sum(time for name, time in times.items() if name not in curves)
        return cls(curves, fixed / whole)

    def kept(self, masks: Masks) -> Tensor:
        """Return the kept share, weighting each mask as `constraint.Share` does."""
        soft = masks.by_block(masks.at_leaves(torch.sigmoid(-masks.log_alpha)))
        parts = [_interpolated(soft[name].mean(), *curve) for name, curve in self.curves.items()]
        return self.fixed + torch.stack(parts).sum()


def _leaves(size: Size) -> int:
    return size.units * size.members


def _curve(budget: TimeBudget, block: Block, sizes: Sequence[Size], whole: int) -> tuple[Tensor, Tensor]:
    """Return the shares of leaves of the sizes, and the shares of `whole` that the fastest size with as many takes."""
    fastest: dict[int, int] = {}
    for size in sorted(sizes, key=_leaves, reverse=True):
        least = min(fastest.values(), default=budget.cost(block, size))
        fastest[_leaves(size)] = min(least, budget.cost(block, size))
    points = sorted(fastest.items())
    shares, times = torch.tensor(points, dtype=torch.float64).unbind(1)
    return shares / _leaves(block.size), times / whole


def _interpolated(share: Tensor, shares: Tensor, times: Tensor) -> Tensor:
    """Return the time at `share`, all scalars; constant outside of `shares` (P,)."""
    if len(shares) == 1:
        return times[0]
    share = share.clamp(shares[0], shares[-1])
    right = int(torch.searchsorted(shares, share.detach())) or 1
    slope = (times[right] - times[right - 1]) / (shares[right] - shares[right - 1])
    return times[right - 1] + slope * (share - shares[right - 1])
