"""How large each block stays. A ratio always means: of the prunable parameters.

Each block is left with one of the sizes that `target.allowed_sizes` gives it. What was reached is what the plan counts,
not what was asked for.
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
from numprune.slices import GONE, Size
from numprune.splits import priced, require_alike, splits_meeting
from numprune.target import HEAD_SHAPES, Sizes

Scores = Mapping[str, Tensor]  # block name -> (units,), higher is kept sooner

_SHARES = 20_000


def check_ratio(anatomy: Anatomy, ratio: float, allowed: Sizes) -> None:
    """Refuse a ratio that no allocation can reach.

    Raises:
        InputError: ratio outside [0, 1), or more than can go with the least size of every block.
    """
    if not 0 <= ratio < 1:
        raise InputError(f"ratio is {ratio}; it must be at least 0 and under 1")
    least = {
        block.name: min((size for size in allowed[block.name] if size.units), key=block.parameters, default=GONE)
        for block in anatomy.blocks
    }
    reachable = 1 - budget_of(anatomy.keeping(least)).prunable_parameters / budget_of(anatomy).prunable_parameters
    if ratio > reachable:
        raise InputError(
            f"ratio is {ratio}, but with the minimum that every block must keep (at least one unit, aligned and split "
            f"for the target, and everything that axes, keep and floors protect) at most {reachable:.3f} of the "
            "prunable "
            "parameters can be removed"
        )


def uniform(anatomy: Anatomy, ratio: float, allowed: Sizes, errors: Errors | None = None) -> dict[str, Size]:
    """Return the size of every block: the same in every layer, so that a stock architecture holds the result.

    Of the splits between attention and MLPs that meet the ratio it is the one that takes most nearly the same share of
    both; by `errors`, the most even of those that cost at most a tenth more than the cheapest. With experts there are
    too many splits to look at each: it is the one of least error, or the most even one, by the knapsack of `by_error`.

    Args:
        errors: as of `by_error`.

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
    """Return the size of every block: all units sorted together, the lowest removed until the parameter *cost* is met.

    A block loses its lowest units in steps from one allowed size to the next; a step's score is their mean. Where the
    result has more than `HEAD_SHAPES` different sizes of attention, they are moved to the nearest of as many levels,
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


def by_error(anatomy: Anatomy, ratio: float, allowed: Sizes, errors: Errors) -> dict[str, Size]:
    """Return the size of every block such that the errors of all blocks together are least, at least `ratio` removed.

    The knapsack is solved by dynamic programming, so that error curves need not be convex; the blocks' errors are taken
    to add up (ZipLM's SPDY, arXiv 2302.04089, takes them so, too).

    Where the result has more than `HEAD_SHAPES` different sizes of attention, levels are chosen as in `global_sort`,
    and all is solved again with only those. Where all attention would go, or all MLPs, the dearest keeps a unit.

    Args:
        errors: of every block, never falling with what is removed.

    Raises:
        InputError: the ratio cannot be reached.
    """

    def solve(allowed: Sizes) -> dict[str, Size]:
        check_ratio(anatomy, ratio, allowed)
        return _least_error(anatomy, ratio, allowed, errors)

    return servable(anatomy, allowed, errors, solve)


def servable(
    anatomy: Anatomy,
    allowed: Sizes,
    errors: Errors,
    solve: Callable[[Sizes], dict[str, Size]],
    solvable: Callable[[Sizes], bool] = lambda _: True,
) -> dict[str, Size]:
    """Return what `solve` gives of the allowed sizes, once they are such that a server runs every result.

    Every kind keeps a block, the dearest with which `solve` can succeed, and attention has at most `HEAD_SHAPES` sizes.
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


def _least_error(anatomy: Anatomy, ratio: float, allowed: Sizes, errors: Errors) -> dict[str, Size]:
    groups = [(block,) for block in anatomy.blocks]
    return _least_price(anatomy, ratio, allowed, lambda block, size: error_at(errors, block, size), groups)


def _least_price(
    anatomy: Anatomy,
    ratio: float,
    allowed: Sizes,
    price: Callable[[Block, Size], float],
    groups: Sequence[Sequence[Block]],
) -> dict[str, Size]:
    """Return the sizes that cost least, at least `ratio` removed, all blocks of a group left with the same."""
    options = [allowed[group[0].name] for group in groups]
    savings = [
        [sum(block.parameters(block.size) - block.parameters(size) for block in group) for size in sizes]
        for group, sizes in zip(groups, options, strict=True)
    ]
    prices = [
        [math.fsum(price(block, size) for block in group) for size in sizes]
        for group, sizes in zip(groups, options, strict=True)
    ]
    wanted = math.ceil(round(ratio * budget_of(anatomy).prunable_parameters, 3))  # of whole parameters
    chosen = knapsack(savings, prices, wanted)
    return {
        block.name: sizes[option]
        for group, sizes, option in zip(groups, options, chosen, strict=True)
        for block in group
    }


def knapsack(savings: Sequence[Sequence[int]], prices: Sequence[Sequence[float]], wanted: int) -> list[int]:
    """Return one option of each item, such that at least `wanted` is saved at the least price.

    By dynamic programming over what is still to be saved, in shares rounded up: the largest share that divides all
    savings or, where that is under a 20,000th of `wanted`, such a share. Of the choices that leave the same number of
    shares only the cheapest is followed, with exactly what it saves. Where none of those saves enough, every item saves
    as much as it can.

    Args:
        savings: of every option of every item.
        prices: of the same; they add up.
    """
    share = max(math.gcd(*(saving for item in savings for saving in item)), -(-wanted // _SHARES), 1)
    last = -(-wanted // share)  # the place of everything that saves enough
    places = torch.arange(last + 1)
    total = torch.full((last + 1,), torch.inf, dtype=torch.float64)  # least price by shares saved so far
    total[0] = 0
    beyond = torch.full((last + 1,), last * share - wanted)  # what that choice saves beyond its shares
    steps = []
    for saved, priced_at in zip(savings, prices, strict=True):
        shares, rests = torch.tensor(saved) // share, torch.tensor(saved) % share
        best, choice = torch.full_like(total, torch.inf), torch.zeros(last + 1, dtype=torch.long)
        end = 0  # from where the last place is reached
        for option, price in enumerate(priced_at):
            priced, fills = total + price, beyond + rests[option] >= share  # the rests make up another share
            for more, these in enumerate((~fills, fills)):
                if not these.any():
                    continue
                shift, reached = min(int(shares[option]) + more, last), priced.where(these, torch.inf)
                short, code = reached[: last - shift], 2 * option + more
                choice[shift:last].masked_fill_(short < best[shift:last], code)
                torch.minimum(short, best[shift:last], out=best[shift:last])
                nearest = last - shift + int(reached[last - shift :].argmin())
                if reached[nearest] < best[last]:
                    best[last], choice[last], end = reached[nearest], code, nearest
        options, filled = choice // 2, choice % 2
        origin = (places - shares[options] - filled).clamp_min(0)  # of places that are not reached nothing is asked
        origin[last] = end
        steps.append((options, origin))
        total, beyond = best, beyond[origin] + rests[options] - share * filled
    if total[last].isinf():
        return [
            max(range(len(saved)), key=lambda option: (saved[option], -priced_at[option]))
            for saved, priced_at in zip(savings, prices, strict=True)
        ]
    chosen = []
    place = last
    for options, origin in reversed(steps):
        chosen.append(int(options[place]))
        place = int(origin[place])
    return chosen[::-1]


def _remove_lowest(anatomy: Anatomy, ratio: float, allowed: Sizes, scores: Scores) -> dict[str, Size]:
    # Units above the largest allowed size go in any case.
    kept = {block.name: allowed[block.name][-1] for block in anatomy.blocks}
    steps: list[tuple[float, Size, Block]] = []  # (score, what is left after it, block), largest first in each block
    for block in anatomy.blocks:
        ascending = scores[block.name].sort().values
        for more, fewer in pairwise(reversed(allowed[block.name])):
            lost = ascending[block.units - more.units : block.units - fewer.units]
            steps.append((float(lost.mean()), fewer, block))
    steps.sort(
        key=lambda step: step[0]
    )  # stable: a block's own steps ascend already, and keep their order where they tie
    whole = budget_of(anatomy).prunable_parameters
    to_remove = ratio * whole - (whole - budget_of(anatomy.keeping(kept)).prunable_parameters)
    left = {kind: sum(kept[block.name].units > 0 for block in anatomy.of_kind(kind)) for kind in anatomy.kinds}
    for _, fewer, block in steps:
        cost = block.parameters(kept[block.name]) - block.parameters(fewer)
        if to_remove < cost / 2:  # nearest: a step that overshoots by more than it falls short is not taken
            break
        if fewer == GONE:
            if left[block.kind] == 1:
                continue  # keep at least one block of each kind
            left[block.kind] -= 1
        kept[block.name] = fewer
        to_remove -= cost
    return kept


def _head_levels(anatomy: Anatomy, kept: Mapping[str, Size], allowed: Sizes) -> Sizes | None:
    """Return the allowed sizes of attention that are among `HEAD_SHAPES` near those kept; a block may still go.

    None where no more than that are kept, or no block has a choice. Blocks without one keep their size. The least size
    is one that every other block can have, if they have as many members: the layers of a model that was pruned before
    may have fewer units than others.
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
    """Return the one of the sizes that costs most nearly what `size` does, the larger of two; none only for none."""
    cost = block.parameters
    candidates = [other for other in sizes if (other == GONE) == (size == GONE)]
    return min(candidates, key=lambda other: (abs(cost(other) - cost(size)), -cost(other)))


def _levels(sizes: Sequence[Size], number: int, cost: Callable[[Size], int]) -> tuple[Size, ...]:
    """Return `number` of the sizes, ascending, such that the sum of distances to the nearest is least (k-medians).

    Distances are those of their costs.
    """
    ordered = sorted(sizes, key=lambda size: (cost(size), size))

    @cache
    def best(end: int, levels: int) -> tuple[float, tuple[Size, ...]]:
        """The least cost of the first `end` sizes with so many levels, each serving a stretch of them."""
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
