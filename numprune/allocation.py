"""The size of each block after pruning. Ratios always refer to the prunable parameters.

Each block gets one of the sizes in `target.allowed_sizes`. The plan records the ratio that was reached, which can
differ from the requested one.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from numprune.blocks import Anatomy, Block
from numprune.budget import budget_of
from numprune.curves import Errors, error_at
from numprune.errors import InputError
from numprune.knapsack import knapsack
from numprune.slices import GONE, Size
from numprune.splits import priced, require_alike, splits_meeting
from numprune.target import HEAD_SHAPES, Sizes

Scores = Mapping[str, Tensor]  # block name -> (units,), the highest are kept

# What a block costs at a size: what ratios are shares of.
Cost = Callable[[Block, Size], int]


def check_ratio(
    anatomy: Anatomy, ratio: float, allowed: Sizes, cost: Cost = Block.parameters, counted: str = "prunable parameters"
) -> None:
    """Refuse a ratio that no allocation can reach.

    Args:
        cost: what the ratio is a share of; `counted`: its name.

    Raises:
        InputError: the ratio is outside [0, 1), or exceeds what the smallest size of every block allows.
    """
    if not 0 <= ratio < 1:
        raise InputError(f"ratio is {ratio}; it must be at least 0 and under 1")
    least = sum(
        min((cost(block, size) for size in allowed[block.name] if size.units), default=0) for block in anatomy.blocks
    )
    reachable = 1 - least / _whole(anatomy, cost)
    if ratio > reachable:
        raise InputError(
            f"ratio is {ratio}, but with the minimum that every block must keep (at least one unit, aligned and split "
            f"for the target, and everything that axes, keep and floors protect) at most {reachable:.3f} of the "
            f"{counted} can be removed"
        )


def _whole(anatomy: Anatomy, cost: Cost) -> int:
    return sum(cost(block, block.size) for block in anatomy.blocks)


def most_cost(anatomy: Anatomy, ratio: float, cost: Cost = Block.parameters) -> int:
    """Return the highest cost of all blocks together with which the ratio is met."""
    whole = _whole(anatomy, cost)
    return whole - math.ceil(round(ratio * whole, 3))  # whole ones


def uniform(anatomy: Anatomy, ratio: float, allowed: Sizes, errors: Errors | None = None) -> dict[str, Size]:
    """Return the size of every block: the same in every layer, so that a stock architecture can represent the result.

    Among the splits between attention and MLPs that meet the ratio, choose the most even one; with `errors`, the most
    even of those that cost at most 10 % more than the cheapest. With experts there are too many splits to try each: the
    knapsack of `by_error` finds the one of least error, or the most even one.

    Args:
        errors: as for `by_error`.

    Raises:
        InputError: the layers already differ, or the ratio cannot be reached.
    """
    check_ratio(anatomy, ratio, allowed)
    if anatomy.of_kind("experts"):
        return _uniform_with_experts(anatomy, ratio, allowed, errors)
    splits = splits_meeting(anatomy, ratio, allowed)
    if errors is not None:
        splits = list(priced(splits, anatomy, errors))
    return splits[0].sizes(anatomy)


def global_sort(anatomy: Anatomy, ratio: float, allowed: Sizes, scores: Scores) -> dict[str, Size]:
    """Return the size of every block: all units are sorted together, and the lowest removed until the ratio is met.

    A block loses its lowest units in steps from one allowed size to the next; the score of a step is their mean. If the
    result has more than `HEAD_SHAPES` different attention sizes, these are moved to the nearest of that many levels,
    and the MLPs make up the difference.

    Args:
        allowed: sizes of whole units, with all their members.

    Raises:
        InputError: the ratio cannot be reached.
    """
    check_ratio(anatomy, ratio, allowed)
    kept = _remove_lowest(anatomy, ratio, allowed, scores)
    levels = _head_levels(anatomy, kept, allowed)
    if levels is None:
        return kept
    blocks = anatomy.of_kind("attention")
    fixed = {block.name: [_nearest(block, levels[block.name], kept[block.name])] for block in blocks}
    return _remove_lowest(anatomy, ratio, {**allowed, **fixed}, scores)


def by_error(
    anatomy: Anatomy, ratio: float, allowed: Sizes, errors: Errors, cost: Cost = Block.parameters
) -> dict[str, Size]:
    """Return the size of every block that minimizes the summed errors with at least `ratio` removed.

    The knapsack problem is solved by dynamic programming, so error curves need not be convex. The errors of blocks are
    assumed to add up, as in ZipLM's SPDY (arXiv 2302.04089).

    If the result has more than `HEAD_SHAPES` different attention sizes, levels are chosen as in `global_sort`, and the
    problem is solved again with only those. If all attention or all MLPs would be removed, the most valuable block
    keeps a unit.

    Args:
        errors: of every block, non-decreasing in what is removed.
        cost: what the ratio is a share of.

    Raises:
        InputError: the ratio cannot be reached.
    """

    def solve(allowed: Sizes) -> dict[str, Size]:
        check_ratio(anatomy, ratio, allowed, cost)
        groups = [(block,) for block in anatomy.blocks]
        return _least_price(anatomy, ratio, allowed, lambda block, size: error_at(errors, block, size), groups, cost)

    return servable(anatomy, allowed, errors, solve)


def servable(
    anatomy: Anatomy,
    allowed: Sizes,
    errors: Errors,
    solve: Callable[[Sizes], dict[str, Size]],
    solvable: Callable[[Sizes], bool] = lambda _: True,
) -> dict[str, Size]:
    """Return the solution of `solve` with allowed sizes restricted until a server can run the result.

    Every kind keeps the most valuable block with which `solve` can succeed, and attention has at most `HEAD_SHAPES`
    sizes.
    """
    kept = solve(allowed)
    for kind in anatomy.kinds:
        blocks = [block for block in anatomy.of_kind(kind) if block.units]
        if blocks and not any(kept[block.name].units for block in blocks):  # keep at least one block of each kind
            blocks.sort(key=lambda block: -error_at(errors, block, GONE))
            staying = ({**allowed, one.name: [size for size in allowed[one.name] if size.units]} for one in blocks)
            allowed = next(sizes for sizes in staying if solvable(sizes))
            kept = solve(allowed)
    levels = _head_levels(anatomy, kept, allowed)
    return kept if levels is None else solve({**allowed, **levels})


def _uniform_with_experts(anatomy: Anatomy, ratio: float, allowed: Sizes, errors: Errors | None) -> dict[str, Size]:
    require_alike(anatomy)

    def price(block: Block, size: Size) -> float:
        if errors is not None:
            return error_at(errors, block, size)
        whole = block.parameters(block.size)
        return whole * (1 - block.parameters(size) / whole - ratio) ** 2  # of shares whose sum is given: least if equal

    return _least_price(anatomy, ratio, allowed, price, anatomy.alike)


def _least_price(
    anatomy: Anatomy,
    ratio: float,
    allowed: Sizes,
    price: Callable[[Block, Size], float],
    groups: Sequence[Sequence[Block]],
    cost: Cost = Block.parameters,
) -> dict[str, Size]:
    """Return the cheapest sizes with at least `ratio` removed, equal for all blocks of a group."""
    options = [allowed[group[0].name] for group in groups]
    costs = [
        [sum(cost(block, size) for block in group) for size in sizes]
        for group, sizes in zip(groups, options, strict=True)
    ]
    prices = [
        [math.fsum(price(block, size) for block in group) for size in sizes]
        for group, sizes in zip(groups, options, strict=True)
    ]
    limit = most_cost(anatomy, ratio, cost)
    # Relative to the dearest size: a block's own may not be allowed and, if times are counted, not be the dearest.
    savings = [[max(of_group) - one for one in of_group] for of_group in costs]
    wanted = max(sum(map(max, costs)) - limit, 0)
    chosen = knapsack(savings, prices, wanted)
    return {
        block.name: sizes[option]
        for group, sizes, option in zip(groups, options, chosen, strict=True)
        for block in group
    }


def _remove_lowest(anatomy: Anatomy, ratio: float, allowed: Sizes, scores: Scores) -> dict[str, Size]:
    # Units above the largest allowed size are removed in any case.
    kept = {block.name: allowed[block.name][-1] for block in anatomy.blocks}
    steps: list[tuple[float, Size, Block]] = []  # (score, size after the step, block), largest size first in each block
    for block in anatomy.blocks:
        ascending = scores[block.name].sort().values
        for more, fewer in pairwise(reversed(allowed[block.name])):
            lost = ascending[block.units - more.units : block.units - fewer.units]
            steps.append((float(lost.mean()), fewer, block))
    steps.sort(key=lambda step: step[0])  # stable: a block's steps already ascend, and ties keep their order
    whole = budget_of(anatomy).prunable_parameters
    to_remove = ratio * whole - (whole - budget_of(anatomy.keeping(kept)).prunable_parameters)
    left = {kind: sum(kept[block.name].units > 0 for block in anatomy.of_kind(kind)) for kind in anatomy.kinds}
    for _, fewer, block in steps:
        cost = block.parameters(kept[block.name]) - block.parameters(fewer)
        if to_remove < cost / 2:  # the nearest: a step is skipped if it would overshoot by more than is missing
            break
        if fewer == GONE:
            if left[block.kind] == 1:
                continue  # keep at least one block of each kind
            left[block.kind] -= 1
        kept[block.name] = fewer
        to_remove -= cost
    return kept


def _head_levels(anatomy: Anatomy, kept: Mapping[str, Size], allowed: Sizes) -> Sizes | None:
    """Return the attention sizes restricted to `HEAD_SHAPES` levels near those kept; a block may still be removed.

    None if there are no more sizes than that, or no block has a choice. Blocks without a choice keep their size. The
    smallest level is one that all other blocks with the same members can have, because layers of an already pruned
    model may have fewer units than others.
    """
    blocks = [block for block in anatomy.of_kind("attention") if kept[block.name].units]
    given = {kept[block.name] for block in blocks if len(allowed[block.name]) == 1}
    free = [block for block in blocks if len(allowed[block.name]) > 1]
    if not free or len({kept[block.name] for block in blocks}) <= HEAD_SHAPES:
        return None
    cost = free[0].parameters
    number = min(max(HEAD_SHAPES - len(given), 1), len(free))
    lowest, *others = _levels([kept[block.name] for block in free], number, cost)
    lowest = min([lowest, *(max(allowed[block.name], key=cost) for block in free)], key=cost)
    levels = {GONE, lowest, *others, *given}
    return {
        block.name: [size for size in allowed[block.name] if size in levels] or [kept[block.name]]
        for block in anatomy.of_kind("attention")
    }


def _nearest(block: Block, sizes: Sequence[Size], size: Size) -> Size:
    """Return the size whose cost is nearest to that of `size`, the larger of two; zero only for zero."""
    cost = block.parameters
    candidates = [other for other in sizes if (other == GONE) == (size == GONE)]
    return min(candidates, key=lambda other: (abs(cost(other) - cost(size)), -cost(other)))


def _levels(sizes: Sequence[Size], number: int, cost: Callable[[Size], int]) -> tuple[Size, ...]:
    """Return `number` of the sizes, ascending, that minimize the sum of distances to the nearest (k-medians).

    Distances are differences of cost.
    """
    ordered = sorted(sizes, key=lambda size: (cost(size), size))

    @cache
    def best(end: int, levels: int) -> tuple[float, tuple[Size, ...]]:
        """Return the least cost of the first `end` sizes with this number of levels, each covering adjacent sizes."""
        if levels == 0:
            return (0 if end == 0 else math.inf, ())
        found = []
        for start in range(levels - 1, end):
            before, lower = best(start, levels - 1)
            median = ordered[(start + end) // 2]
            apart = sum(abs(cost(size) - cost(median)) for size in ordered[start:end])
            found.append((before + apart, (*lower, median)))
        return min(found)

    return best(len(ordered), number)[1]


def keep_highest(scores: Tensor, count: int) -> Tensor:
    """Return the indices of the `count` highest of (units,) scores, ascending. Ties go to the lower index."""
    order = torch.sort(scores, descending=True, stable=True).indices
    return order[:count].sort().values


ALLOCATIONS: dict[str, Callable[..., dict[str, Size]]] = {
    "uniform": uniform,
    "global": global_sort,
    "error": by_error,
}
