"""The cheapest form of every block with which the model stays within a limit.

A form of a block has a price, its loss in nats per token, and a cost, what is limited: bytes, or time.
"""

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from numprune.allocation import servable
from numprune.blocks import Anatomy, Block
from numprune.curves import Errors
from numprune.errors import InputError
from numprune.knapsack import knapsack, lower_bound, padded
from numprune.slices import Size
from numprune.target import HEAD_SHAPES, Sizes

logger = logging.getLogger(__name__)


class _Sized(Protocol):
    @property
    def size(self) -> Size: ...


F = TypeVar("F", bound=_Sized)


@dataclass(frozen=True)
class Limit(Generic[F]):
    """A limit on the cost of a whole model.

    Attributes:
        total: the highest cost.
        around: cost of what is not in blocks.
        forms: returns the forms of a block that may have these sizes.
        cost: of a block in a form, an integer of at least 0.
        words: returns a cost in words.
    """

    total: int
    around: int
    forms: Callable[[Sequence[Size]], Iterable[F]]
    cost: Callable[[Block, F], int]
    words: Callable[[int], str]

    def least(self, anatomy: Anatomy, allowed: Sizes) -> int:
        """Return the lowest possible cost of the whole model. A block of each kind stays."""
        least = self.around
        for kind in anatomy.kinds:
            staying = []  # additional cost of keeping a unit of the block
            for block in anatomy.of_kind(kind):
                forms = list(self.forms(allowed[block.name]))
                costs = [self.cost(block, form) for form in forms]
                least += min(costs)
                staying += [cost - min(costs) for form, cost in zip(forms, costs, strict=True) if form.size.units]
            least += min(staying, default=0)
        return least


@dataclass(frozen=True)
class Option(Generic[F]):
    """A form of a block with its cost and its price."""

    form: F
    cost: int
    price: float


def cheapest(
    anatomy: Anatomy, limit: Limit[F], allowed: Sizes, errors: Errors, price: Callable[[Block, F], float]
) -> dict[str, F]:
    """Return the form of every block with the lowest summed price within the limit.

    Args:
        allowed: sizes of every block; `limit.least` must be within the limit.
        errors: of removals, by block.
        price: of a block in a form; prices of blocks add up.

    Raises:
        InputError: only a model with too many sizes of attention to be served well stays within the limit.
    """
    chosen: dict[str, Option[F]] = {}
    bounds: list[float] = []

    def solve(sizes: Sizes) -> dict[str, Size]:
        least = limit.least(anatomy, sizes)
        if least > limit.total:  # only after `servable` has restricted the sizes of attention
            raise InputError(
                f"the budget is {limit.words(limit.total)}, and of what fits in it nothing can be served well: "
                f"attention has more than {HEAD_SHAPES} sizes; allow {limit.words(least)}"
            )
        choices = [_worth_it(block, limit, sizes[block.name], price) for block in anatomy.blocks]
        most = limit.around + sum(choice[-1].cost for choice in choices)
        savings = [[choice[-1].cost - option.cost for option in choice] for choice in choices]
        prices = [[option.price for option in choice] for choice in choices]
        wanted = max(most - limit.total, 0)
        found = knapsack(savings, prices, wanted)
        bounds.append(lower_bound(padded(savings, 0.0), padded(prices, math.inf), wanted))
        for block, choice, option in zip(anatomy.blocks, choices, found, strict=True):
            chosen[block.name] = choice[option]
        return {name: option.form.size for name, option in chosen.items()}

    servable(anatomy, allowed, errors, solve, lambda sizes: limit.least(anatomy, sizes) <= limit.total)
    logger.info(
        "the chosen sizes cost %.4g nats per token by the error curves; nothing within the budget costs less than %.4g",
        math.fsum(option.price for option in chosen.values()),
        bounds[0],  # of all allowed sizes
    )
    return {name: option.form for name, option in chosen.items()}


def _worth_it(
    block: Block, limit: Limit[F], sizes: Sequence[Size], price: Callable[[Block, F], float]
) -> list[Option[F]]:
    """Return the Pareto-optimal options of a block in cost and price, lowest cost first."""
    found = [Option(form, limit.cost(block, form), price(block, form)) for form in limit.forms(sizes)]
    best: list[Option[F]] = []
    for option in sorted(found, key=lambda option: (option.cost, option.price)):
        if not best or option.price < best[-1].price:
            best.append(option)
    return best
