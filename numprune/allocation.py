"""How many units each block keeps. A ratio always means: of the prunable parameters.

Each block keeps one of the counts that `target.allowed_counts` gives it. What was reached is what the plan counts, not
what was asked for.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from numprune.anatomy import Anatomy, Block
from numprune.budget import measure
from numprune.errors import InputError
from numprune.splits import Errors, priced, splits_meeting
from numprune.target import HEAD_SHAPES, Counts, nearest

Scores = Mapping[str, Tensor]  # block name -> (units,), higher is kept sooner

_SHARES = 20_000


def check_ratio(anatomy: Anatomy, ratio: float, allowed: Counts) -> None:
    """Refuse a ratio that no allocation can reach.

    Raises:
        InputError: ratio outside [0, 1), or more than can go with the least count of every block.
    """
    if not 0 <= ratio < 1:
        raise InputError(f"ratio is {ratio}; it must be at least 0 and under 1")
    least = {name: next((count for count in counts if count), 0) for name, counts in allowed.items()}
    reachable = 1 - measure(anatomy.keeping(least)).prunable_parameters / measure(anatomy).prunable_parameters
    if ratio > reachable:
        raise InputError(
            f"ratio is {ratio}, but with the least that every block must keep (at least one unit, aligned and split as "
            f"the target asks) at most {reachable:.3f} of the prunable parameters can be removed"
        )


def uniform(anatomy: Anatomy, ratio: float, allowed: Counts, errors: Errors | None = None) -> dict[str, int]:
    """Return units kept per block: the same number in every layer, so that a stock architecture holds the result.

    Of the splits between attention and MLPs that meet the ratio it is the one that takes most nearly the same share of
    both; by `errors`, the most even of those that cost at most a tenth more than the cheapest.

    Args:
        errors: as of `by_error`.

    Raises:
        InputError: the layers already differ, or the ratio cannot be reached.
    """
    check_ratio(anatomy, ratio, allowed)
    splits = splits_meeting(anatomy, ratio, allowed)
    if errors is not None:
        splits = list(priced(splits, anatomy, errors))
    return splits[0].units(anatomy)


def global_sort(anatomy: Anatomy, ratio: float, allowed: Counts, scores: Scores) -> dict[str, int]:
    """Return units kept per block: all units sorted together, the lowest removed until the parameter *cost* is reached.

    A block loses its lowest units in steps from one allowed count to the next; a step's score is their mean. Where the
    result has more than `HEAD_SHAPES` different numbers of KV heads, the numbers are moved to the nearest of as many
    levels, and the MLPs make up the difference.

    Raises:
        InputError: the ratio cannot be reached.
    """
    check_ratio(anatomy, ratio, allowed)
    kept = _remove_lowest(anatomy, ratio, allowed, scores)
    heads = {block.name: kept[block.name] for block in anatomy.of_kind("attention")}
    if len(set(heads.values()) - {0}) <= HEAD_SHAPES:
        return kept
    levels = _head_levels(heads, allowed)
    fixed = {
        name: [nearest([level for level in levels if level <= allowed[name][-1]], count) if count else 0]
        for name, count in heads.items()
    }
    return _remove_lowest(anatomy, ratio, {**allowed, **fixed}, scores)


def by_error(anatomy: Anatomy, ratio: float, allowed: Counts, errors: Errors) -> dict[str, int]:
    """Return units kept per block such that the errors of all blocks together are least, at least `ratio` removed.

    The knapsack is solved by dynamic programming, so that error curves need not be convex; the blocks' errors are taken
    to add up (ZipLM's SPDY, arXiv 2302.04089, takes them so, too). Costs are counted in the largest share that divides
    them all, or, where that is under a 20,000th of what must go, rounded to such a share.

    Where the result has more than `HEAD_SHAPES` different numbers of KV heads, levels are chosen as in `global_sort`,
    and all is solved again with only those. Where all attention would go, or all MLPs, the dearest keeps a unit.

    Args:
        errors: block name -> (units + 1,), the error once the n cheapest units are gone, n = 0 … units; never falling.

    Raises:
        InputError: the ratio cannot be reached.
    """
    check_ratio(anatomy, ratio, allowed)
    kept = _least_error(anatomy, ratio, allowed, errors)
    for kind in ("attention", "mlp"):
        blocks = [block for block in anatomy.of_kind(kind) if block.units]
        if blocks and not any(kept[block.name] for block in blocks):  # a model without attention is none
            dearest = max(blocks, key=lambda block: float(errors[block.name][block.units])).name
            allowed = {**allowed, dearest: [count for count in allowed[dearest] if count]}
            kept = _least_error(anatomy, ratio, allowed, errors)
    heads = {block.name: kept[block.name] for block in anatomy.of_kind("attention")}
    if len(set(heads.values()) - {0}) <= HEAD_SHAPES:
        return kept
    levels = {*_head_levels(heads, allowed), 0}
    fixed = {name: [count for count in allowed[name] if count in levels] for name in heads}
    allowed = {**allowed, **fixed}
    check_ratio(anatomy, ratio, allowed)
    return _least_error(anatomy, ratio, allowed, errors)


def _least_error(anatomy: Anatomy, ratio: float, allowed: Counts, errors: Errors) -> dict[str, int]:
    costs = {
        block.name: [(block.units - kept) * block.parameters_per_unit for kept in allowed[block.name]]
        for block in anatomy.blocks
    }
    wanted = ratio * measure(anatomy).prunable_parameters
    share = max(math.gcd(*(cost for block in costs.values() for cost in block)), wanted / _SHARES)
    if not share:
        return {block.name: allowed[block.name][-1] for block in anatomy.blocks}
    last = math.ceil(round(wanted / share, 6))  # the place of everything that costs as much or more
    total = torch.full((last + 1,), torch.inf, dtype=torch.float64)  # least error by shares removed so far
    total[0] = 0
    chosen = []
    for block in anatomy.blocks:
        best, choice = torch.full_like(total, torch.inf), torch.zeros(last + 1, dtype=torch.long)
        for option, (kept, cost) in enumerate(zip(allowed[block.name], costs[block.name], strict=True)):
            shift = min(round(cost / share), last)
            reached = torch.full_like(total, torch.inf)
            reached[shift:] = total[: last + 1 - shift]
            reached[last] = total[last - shift :].min()
            reached += errors[block.name][block.units - kept]
            better = reached < best
            best[better], choice[better] = reached[better], option
        chosen.append((block, choice, total))
        total = best
    result, place = {}, int(torch.isfinite(total).nonzero().max())  # short of `last` only by rounded costs
    for block, choice, before in reversed(chosen):
        option = int(choice[place])
        result[block.name] = allowed[block.name][option]
        shift = min(round(costs[block.name][option] / share), last)
        place = last - shift + int(before[last - shift :].argmin()) if place == last else place - shift
    return result


def _remove_lowest(anatomy: Anatomy, ratio: float, allowed: Counts, scores: Scores) -> dict[str, int]:
    # Units above the largest allowed count go in any case.
    kept = {block.name: allowed[block.name][-1] for block in anatomy.blocks}
    steps: list[tuple[float, int, Block]] = []  # (score, units left after it, block), from most to fewest in each block
    for block in anatomy.blocks:
        ascending = scores[block.name].sort().values
        for more, fewer in pairwise(reversed(allowed[block.name])):
            steps.append((float(ascending[block.units - more : block.units - fewer].mean()), fewer, block))
    steps.sort(
        key=lambda step: step[0]
    )  # stable: a block's own steps ascend already, and keep their order where they tie
    to_remove = ratio * measure(anatomy).prunable_parameters
    to_remove -= sum((block.units - kept[block.name]) * block.parameters_per_unit for block in anatomy.blocks)
    left = {kind: sum(kept[block.name] > 0 for block in anatomy.of_kind(kind)) for kind in ("attention", "mlp")}
    for _, fewer, block in steps:
        cost = (kept[block.name] - fewer) * block.parameters_per_unit
        if to_remove < cost / 2:  # nearest: a step that overshoots by more than it falls short is not taken
            break
        if fewer == 0:
            if left[block.kind] == 1:
                continue  # the last of its kind stays: a model without attention is none
            left[block.kind] -= 1
        kept[block.name] = fewer
        to_remove -= cost
    return kept


def _head_levels(heads: Mapping[str, int], allowed: Counts) -> list[int]:
    """Return `HEAD_SHAPES` numbers of KV heads near those kept (block name -> number), ascending.

    The least is one that every block can have: the layers of a model that was pruned before may have fewer than others.
    """
    lowest, *others = _levels([count for count in heads.values() if count], HEAD_SHAPES)
    return [min(lowest, *(allowed[name][-1] for name, count in heads.items() if count)), *others]


def _levels(counts: Sequence[int], number: int) -> tuple[int, ...]:
    """Return `number` of the counts, ascending, such that the sum of distances to the nearest is least (k-medians)."""
    ordered = sorted(counts)

    @cache
    def best(end: int, levels: int) -> tuple[int, tuple[int, ...]]:
        """The least cost of the first `end` counts with so many levels, each serving a stretch of them."""
        if levels == 0:
            return (0 if end == 0 else sum(ordered) + 1, ())
        found = []
        for start in range(levels - 1, end):
            cost, lower = best(start, levels - 1)
            median = ordered[(start + end) // 2]
            found.append((cost + sum(abs(count - median) for count in ordered[start:end]), (*lower, median)))
        return min(found)

    return best(len(ordered), number)[1]


def keep_highest(scores: Tensor, count: int) -> Tensor:
    """Return the indices of the `count` highest of (units,) scores, ascending. Ties go to the lower index."""
    order = torch.sort(scores, descending=True, stable=True).indices
    return order[:count].sort().values


ALLOCATIONS: dict[str, Callable[..., dict[str, int]]] = {
    "uniform": uniform,
    "global": global_sort,
    "error": by_error,
}
