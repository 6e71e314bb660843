"""From masks to units: the sizes that keep the most information within the budget, and the best units of each block."""

from dataclasses import replace

import torch
from torch import Tensor

from numprune.allocation import by_error, keep_highest, uniform
from numprune.learning.constraint import Constraint
from numprune.learning.masks import Masks
from numprune.options import PruneOptions, sizes_allowed
from numprune.slices import Kept, Size
from numprune.target import Sizes

ALLOCATIONS = ("error", "uniform")


def sizes_under(constraint: Constraint, options: PruneOptions) -> Sizes:
    """Return the allowed sizes of each block. What has no counted cost is kept.

    Raises:
        InputError: like `sizes_allowed`; so, too, if the target does not support the size of a block that is kept.
    """
    if constraint.counted == "kv-bytes":
        options = replace(options, axes=("kv-groups",))
    allowed = sizes_allowed(constraint.anatomy, options)
    return {
        block.name: allowed[block.name] if constraint.of_unit(block) else [block.size]
        for block in constraint.anatomy.blocks
    }


@torch.no_grad()
def rounded(constraint: Constraint, masks: Masks, options: PruneOptions) -> dict[str, Kept]:
    """Return what is kept of each block, by name: at least `options.ratio` removed, in sizes the target supports.

    The price of a unit is its information, see `Masks.prices`. The knapsack of the allocation chooses the sizes whose
    removed units cost least in total. Because prices are weighted by the counted cost, this ranks units by log alpha
    over all blocks, corrected for alignment, floors and whole steps.

    Raises:
        InputError: like the allocations.
    """
    anatomy = constraint.anatomy
    prices = {name: (own.double().cpu(), members.double().cpu()) for name, (own, members) in masks.prices().items()}
    errors = {block.name: torch.zeros(block.units + 1, block.members, dtype=torch.float64) for block in anatomy.blocks}
    errors |= {name: _curve(*of_block) for name, of_block in prices.items()}
    allowed = sizes_under(constraint, options)
    if options.allocation == "uniform":
        sizes = uniform(anatomy, options.ratio, allowed, errors)
    else:
        sizes = by_error(anatomy, options.ratio, allowed, errors, constraint.cost)
    return {
        block.name: _best(*prices[block.name], sizes[block.name])
        if block.name in prices
        else Kept.whole(torch.arange(block.units), block.members)
        for block in anatomy.blocks
    }


def _curve(own: Tensor, members: Tensor) -> Tensor:
    """Return the price of the n cheapest units and of the m cheapest members of each other unit, (units + 1, members).

    Args:
        own: (units,), price of a unit without its members.
        members: (units, members).
    """
    totals = own + members.sum(1)
    order = totals.argsort()
    fewer = members.sort(1).values.cumsum(1).roll(1, 1)  # of each unit's m cheapest members
    fewer[:, 0] = 0
    nothing = torch.zeros(1, members.shape[1], dtype=members.dtype)
    gone = torch.cat([nothing[:, :1], totals[order].cumsum(0)[:, None]])
    return gone + fewer.sum(0) - torch.cat([nothing, fewer[order].cumsum(0)])


def _best(own: Tensor, members: Tensor, size: Size) -> Kept:
    """Return the units with the highest prices, and the members with the highest prices of each."""
    units = keep_highest(own + members.sum(1), size.units)
    if size.members == members.shape[1] or not size.units:
        return Kept.whole(units, members.shape[1])
    return Kept(units, torch.stack([keep_highest(of_unit, size.members) for of_unit in members[units]]))
