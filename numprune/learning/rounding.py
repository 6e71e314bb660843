"""From masks to units: the sizes that keep most of their information inside the budget, and in each block the best."""

import torch
from torch import Tensor

from numprune.allocation import by_error, keep_highest, uniform
from numprune.blocks import Anatomy
from numprune.curves import Errors
from numprune.learning.masks import Masks
from numprune.options import PruneOptions, sizes_allowed
from numprune.slices import Kept

ALLOCATIONS = {"error": by_error, "uniform": uniform}


@torch.no_grad()
def rounded(anatomy: Anatomy, masks: Masks, options: PruneOptions) -> dict[str, Kept]:
    """Return what is kept of each block, by its name: at least `options.ratio` removed, in sizes the target can run.

    A unit's price is its term of the objective, `Masks.weights` times `Masks.information`. The knapsack of the
    allocation takes the sizes whose removed units cost least together. As units are weighted by what they cost in
    parameters, that is a ranking by log alpha over all blocks, corrected for alignment, floors and whole steps.

    Raises:
        InputError: as the allocations do.
    """
    prices = masks.by_block(masks.weights * masks.information)
    allowed = sizes_allowed(anatomy, options)
    sizes = ALLOCATIONS[options.allocation](anatomy, options.ratio, allowed, _errors(anatomy, prices))
    kept = {}
    for block in anatomy.blocks:
        size = sizes[block.name]
        units = keep_highest(prices[block.name], size.units) if block.name in prices else torch.arange(size.units)
        kept[block.name] = Kept.whole(units.cpu(), block.members)
    return kept


def _errors(anatomy: Anatomy, prices: dict[str, Tensor]) -> Errors:
    """Return the price of the n cheapest units of each block, (units + 1, 1); of blocks that are not masked 0."""
    errors = {block.name: torch.zeros(block.units + 1, 1, dtype=torch.float64) for block in anatomy.blocks}
    for name, price in prices.items():
        errors[name][1:, 0] = price.double().cpu().sort().values.cumsum(0)
    return errors
