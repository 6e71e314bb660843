"""The plans that a search may try: sizes of all blocks that together stay within a budget.

A *ladder* is the list of a block's sizes worth trying, by cost: none of them costs more and loses more than another.
"""

import math
import random
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from numprune.allocation import most_cost
from numprune.blocks import Anatomy, Block
from numprune.curves import Errors, error_at
from numprune.options import PruneOptions
from numprune.quantization.allocation import Form, block_bytes
from numprune.slices import GONE, Size
from numprune.target import HEAD_SHAPES, Sizes

_TRIES = 50  # draws for each neighbour asked for
# The largest and the smallest step, as shares of the rungs of a block's ladder.
_LARGEST, _SMALLEST = 1 / 8, 1 / 64


class Rung(NamedTuple):
    cost: int
    size: Size


@dataclass(frozen=True)
class Space:
    """Plans of at most `limit` in which every kind of block is left, and attention has few different sizes.

    Attributes:
        anatomy: of the model.
        ladders: block name -> rungs, cost ascending.
        limit: on the summed cost of all blocks.
        shapes: on the number of different sizes of attention.
    """

    anatomy: Anatomy
    ladders: Mapping[str, Sequence[Rung]]
    limit: int
    shapes: int

    @classmethod
    def around(
        cls,
        anatomy: Anatomy,
        start: Mapping[str, Size],
        allowed: Sizes,
        errors: Errors,
        cost: Callable[[Block, Size], int],
        limit: int,
    ) -> "Space":
        """Return the space around the plan `start`, which must be within the limit.

        Args:
            allowed: sizes of every block.
            errors: of removals, by block.
            cost: of a block at a size.
        """
        ladders = {
            block.name: _ladder(block, start[block.name], allowed[block.name], errors, cost) for block in anatomy.blocks
        }
        return cls(anatomy, ladders, limit, max(HEAD_SHAPES, len(_shapes(anatomy, start))))

    def cost(self, plan: Mapping[str, Size]) -> int:
        """Return the summed cost of all blocks."""
        return sum(ladder[_place(ladder, plan[name])].cost for name, ladder in self.ladders.items())

    def neighbours(
        self, plan: Mapping[str, Size], count: int, seen: set[tuple[Size, ...]], draw: random.Random
    ) -> list[dict[str, Size]]:
        """Return up to `count` plans that are not in `seen`, adding them: fewer if there are hardly any others."""
        free = [name for name, ladder in self.ladders.items() if len(ladder) > 1]
        found: list[dict[str, Size]] = []
        for _ in range(_TRIES * count if len(free) > 1 else 0):
            grows, shrinks = draw.sample(free, 2)
            step = draw.choice(_steps(len(self.ladder(plan, grows))))
            other = self.switched(plan, grows, shrinks, step)
            if other is None or key(other) in seen:
                continue
            seen.add(key(other))
            found.append(other)
            if len(found) == count:
                break
        return found

    def switched(self, plan: Mapping[str, Size], grows: str, shrinks: str, step: int) -> dict[str, Size] | None:
        """Return the plan with one block larger and another smaller; None if no sizes allow that.

        The first grows by `step` rungs, and the second shrinks as little as pays for that. If the second's rungs are so
        far apart that more is left over, the first takes it. Blocks of the same kind thus exchange equal costs.
        """
        up, down = self.ladder(plan, grows), self.ladder(plan, shrinks)
        high, low = _place(up, plan[grows]), _place(down, plan[shrinks])
        unspent = self.limit - self.cost(plan)
        wanted = up[min(high + step, len(up) - 1)].cost - up[high].cost
        less = bisect_right(down, down[low].cost + unspent - wanted, hi=low, key=lambda rung: rung.cost) - 1
        if less < 0:
            return None
        afforded = up[high].cost + unspent + down[low].cost - down[less].cost
        more = bisect_right(up, afforded, key=lambda rung: rung.cost) - 1
        if more <= high:
            return None
        other = {**plan, grows: up[more].size, shrinks: down[less].size}
        return other if self.is_servable(other) else None

    def ladder(self, plan: Mapping[str, Size], name: str) -> Sequence[Rung]:
        """Return the rungs of a block that keep attention servable while the other blocks stay as in the plan.

        Once the others have all the sizes that attention may have, these are the only ones left. On the whole ladder,
        nearly every step would lead to one more, and the search could only change MLPs.
        """
        ladder, attention = self.ladders[name], {block.name for block in self.anatomy.of_kind("attention")}
        others = _shapes(self.anatomy, {**plan, name: GONE})
        if name not in attention or len(others) < self.shapes:
            return ladder
        return [rung for rung in ladder if rung.size in others or not rung.size.units]

    def is_servable(self, plan: Mapping[str, Size]) -> bool:
        """Return whether every kind of block is left, and attention has few enough sizes."""
        kinds = {block.kind for block in self.anatomy.blocks if block.units}
        left = {block.kind for block in self.anatomy.blocks if plan[block.name].units}
        return left == kinds and len(_shapes(self.anatomy, plan)) <= self.shapes


def cost_and_limit(anatomy: Anatomy, options: PruneOptions) -> tuple[Callable[[Block, Size], int], int]:
    """Return the cost of a block at a size, and the limit on the sum of all blocks, as the knapsack has them.

    Bytes are of weights that are not quantized, or of KV cache, and times in nanoseconds; without a budget, the ratio
    limits parameters.
    """
    if (budget := options.budget) is not None:
        value = budget.value
        return lambda block, size: block_bytes(block, Form(size, None), value), budget.limit - budget.around
    if (times := options.time_budget) is not None:
        return times.cost, times.limit - times.around(anatomy)
    if (cache := options.kv_budget) is not None:
        return lambda block, size: cache.cost(anatomy, block, size), cache.limit
    return Block.parameters, most_cost(anatomy, options.ratio)


def key(plan: Mapping[str, Size]) -> tuple[Size, ...]:
    """Return what identifies a plan; the order of its blocks is that of the model."""
    return tuple(plan.values())


def _ladder(
    block: Block, start: Size, sizes: Sequence[Size], errors: Errors, cost: Callable[[Block, Size], int]
) -> list[Rung]:
    """Return the Pareto-optimal sizes in cost and error, and `start`, cost ascending."""
    found, least = [], math.inf
    for size in sorted(sizes, key=lambda size: (cost(block, size), error_at(errors, block, size))):
        error = error_at(errors, block, size)
        if error < least or size == start:
            found.append(Rung(cost(block, size), size))
        least = min(least, error)
    return found


def _place(ladder: Sequence[Rung], size: Size) -> int:
    return next(index for index, rung in enumerate(ladder) if rung.size == size)


def _steps(rungs: int) -> list[int]:
    """Return the steps to draw from, powers of two."""
    powers = [1 << power for power in range(rungs.bit_length())]
    return [step for step in powers if rungs * _SMALLEST / 2 < step <= max(1, rungs * _LARGEST)]


def _shapes(anatomy: Anatomy, plan: Mapping[str, Size]) -> set[Size]:
    return {size for block in anatomy.of_kind("attention") if (size := plan[block.name]).units}
