"""From masks to units: the sizes that keep the most information within the budget, and the best units of each block."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

from numprune.allocation import by_error, keep_highest, uniform
from numprune.curves import Errors, error_at
from numprune.errors import InputError
from numprune.hidden import hidden_sizes, ratio_beside
from numprune.knapsack import lower_bound, padded
from numprune.learning.constraint import Constraint
from numprune.learning.masks import Masks
from numprune.options import PruneOptions, sizes_allowed
from numprune.slices import Kept, Size
from numprune.target import Sizes
from numprune.time_budget import TimeBudget, measured_sizes

K = TypeVar("K", float, tuple[float, float])

ALLOCATIONS = ("error", "uniform")

_TRIED = 16  # hidden sizes at a time


def sizes_under(constraint: Constraint, options: PruneOptions) -> Sizes:
    """Return the allowed sizes of each block. What has no counted cost is kept.

    Raises:
        InputError: like `sizes_allowed`; so, too, if the target does not support the size of a block that is kept.
    """
    if constraint.counted == "kv-bytes":
        options = replace(options, axes=("kv-groups",))
    allowed = sizes_allowed(constraint.anatomy, options)
    if isinstance(constraint.budget, TimeBudget):
        allowed = measured_sizes(constraint.anatomy, allowed, constraint.budget)
    return {
        block.name: allowed[block.name] if constraint.of_unit(block) else [block.size]
        for block in constraint.anatomy.blocks
    }


@dataclass(frozen=True)
class Choice:
    """What is kept.

    Attributes:
        kept: of each block, by name.
        coordinates: of the residual stream, (H',) indices, ascending; None: it has no masks.
    """

    kept: dict[str, Kept]
    coordinates: Tensor | None = None

    @property
    def sizes(self) -> dict[str, Size]:
        return {name: kept.size for name, kept in self.kept.items()}

    @property
    def hidden_size(self) -> int | None:
        return None if self.coordinates is None else len(self.coordinates)


@torch.no_grad()
def rounded(constraint: Constraint, masks: Masks, options: PruneOptions) -> Choice:
    """Return what is kept: at least `options.ratio` removed, in sizes the target supports.

    The price of a unit is its information, see `Masks.prices`. The knapsack of the allocation chooses the sizes whose
    removed units cost least in total. Because prices are weighted by the counted cost, this ranks units by log alpha
    over all blocks, corrected for alignment, floors and whole steps.

    With masks on the residual stream, the knapsack is solved at several hidden sizes. The one is chosen at which the
    removed units and coordinates cost least together. Lower bounds on the prices say at which it need not be solved.

    Raises:
        InputError: like the allocations.
    """
    anatomy = constraint.anatomy
    prices = {name: (own.double().cpu(), members.double().cpu()) for name, (own, members) in masks.prices().items()}
    errors = {block.name: torch.zeros(block.units + 1, block.members, dtype=torch.float64) for block in anatomy.blocks}
    errors |= {name: _curve(*of_block) for name, of_block in prices.items()}
    coordinates = None
    if masks.stream is None:
        sizes = _sizes(constraint, options, errors)
    else:
        of_stream = masks.stream_prices().double().cpu()
        sizes, hidden_size = _narrowest(constraint, options, errors, of_stream)
        coordinates = keep_highest(of_stream, hidden_size)
    kept = {
        block.name: _best(*prices[block.name], sizes[block.name])
        if block.name in prices
        else Kept.whole(torch.arange(block.units), block.members)
        for block in anatomy.blocks
    }
    return Choice(kept, coordinates)


def _sizes(constraint: Constraint, options: PruneOptions, errors: Errors) -> dict[str, Size]:
    anatomy, allowed = constraint.anatomy, sizes_under(constraint, options)
    if options.allocation == "uniform":
        return uniform(anatomy, options.ratio, allowed, errors)
    return by_error(anatomy, options.ratio, allowed, errors, constraint.cost)


def _narrowest(
    constraint: Constraint, options: PruneOptions, errors: Errors, of_stream: Tensor
) -> tuple[dict[str, Size], int]:
    """Return the sizes of the blocks, and the hidden size, whose removal is cheapest."""
    cheapest = torch.cat([of_stream.new_zeros(1), of_stream.sort().values.cumsum(0)])
    blocks = constraint.anatomy.blocks

    @cache
    def at(hidden_size: int) -> tuple[float, float, dict[str, Size]]:
        """Return what is missing of the ratio, the price, and the sizes."""
        narrow = constraint.narrowed(hidden_size)
        try:
            sizes = _sizes(narrow, under(constraint, options, hidden_size), errors)
        except InputError:  # units alone cannot make up the rest
            return math.inf, math.inf, {}
        missing = options.ratio - constraint.removed(sizes, hidden_size)  # `uniform` takes the nearest splits
        units = math.fsum(error_at(errors, block, sizes[block.name]) for block in blocks if block.units)
        return max(0.0, round(missing, 9)), units + float(cheapest[len(of_stream) - hidden_size]), sizes

    bound = _bound(constraint, options, errors)

    def at_least(hidden_size: int) -> tuple[float, float]:
        """Return a lower bound on `at`, a millionth lower for rounding errors."""
        return 0.0, (1 - 1e-6) * bound(hidden_size) + float(cheapest[len(of_stream) - hidden_size])

    sizes = hidden_sizes(constraint.anatomy, options.target)
    hidden_size = cheapest_of(sizes, lambda size: at(size)[:2], at_least)
    return at(hidden_size)[2], hidden_size


def _bound(constraint: Constraint, options: PruneOptions, errors: Errors) -> Callable[[int], float]:
    """Return a function that gives a lower bound on the price of the removed units at a hidden size."""
    allowed = sizes_under(constraint, replace(options, allocation="error"))  # `uniform` has no others
    blocks = [block for block in constraint.anatomy.blocks if block.units]
    prices = padded([[error_at(errors, block, size) for size in allowed[block.name]] for block in blocks], math.inf)

    def savings(one: Constraint) -> Tensor:
        return padded(
            [
                [one.cost(block, block.size) - one.cost(block, size) for size in allowed[block.name]]
                for block in one.anatomy.blocks
                if block.units
            ],
            0.0,
        )

    thin, wide = savings(constraint.narrowed(0)), savings(constraint)  # they are linear in the hidden size

    def bound(hidden_size: int) -> float:
        wanted = under(constraint, options, hidden_size).ratio * constraint.narrowed(hidden_size).whole
        return lower_bound(thin + hidden_size / constraint.anatomy.hidden_size * (wide - thin), prices, wanted)

    return bound


def under(constraint: Constraint, options: PruneOptions, hidden_size: int) -> PruneOptions:
    """Return the options for the units of a model with this hidden size: the rest of the ratio."""
    left = constraint.narrowed(hidden_size).whole
    return replace(options, ratio=ratio_beside(options.ratio, constraint.whole, left))


def cheapest_of(sizes: Sequence[int], price: Callable[[int], K], least: Callable[[int], K]) -> int:
    """Return the cheapest of ascending sizes, the largest of equal ones.

    With many sizes, every n-th is tried, and then those around the cheapest: prices fall and then rise. Sizes that cost
    more than the cheapest so far by `least`, a lower bound on the price, are left out.
    """
    low: int = 0
    high: int = len(sizes) - 1
    while True:
        step: int = max(1, (high - low) // _TRIED)
        tried = {*range(high, low - 1, -step), low}
        found: list[tuple[K, int]] = []
        for bound, index in sorted((least(sizes[index]), -index) for index in tried):
            if found and bound > min(found)[0]:
                break
            found.append((price(sizes[-index]), index))
        best = -min(found)[1]
        if step == 1:
            return sizes[best]
        low, high = max(low, best - step), min(high, best + step)


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
