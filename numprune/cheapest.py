"""The cheapest form of every block with which the model stays within one or several limits.

A form of a block has a price, its loss in nats per token, and costs, what is limited: bytes, or time.
"""

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np

from numprune.allocation import servable
from numprune.blocks import Anatomy, Block
from numprune.curves import Errors
from numprune.errors import InputError
from numprune.multi_knapsack import is_possible, multi_knapsack, saving_most
from numprune.slices import Size
from numprune.target import HEAD_SHAPES, Sizes

logger = logging.getLogger(__name__)


class _Sized(Protocol):
    @property
    def size(self) -> Size: ...


F = TypeVar("F", bound=_Sized)
Forms = Callable[[Sequence[Size]], Iterable[F]]  # the forms of a block that may have these sizes


@dataclass(frozen=True)
class Limit(Generic[F]):
    """A limit on the cost of a whole model.

    Attributes:
        total: the highest cost.
        around: cost of what is not in blocks.
        cost: of a block in a form, an integer of at least 0.
        words: returns a cost in words.
    """

    total: int
    around: int
    cost: Callable[[Block, F], int]
    words: Callable[[int], str]

    def least(self, anatomy: Anatomy, allowed: Sizes, forms: Forms[F]) -> int:
        """Return the lowest possible cost of the whole model. A block of each kind stays."""
        least = self.around
        for kind in anatomy.kinds:
            staying = []  # additional cost of keeping a unit of the block
            for block in anatomy.of_kind(kind):
                found = list(forms(allowed[block.name]))
                costs = [self.cost(block, form) for form in found]
                least += min(costs)
                staying += [cost - min(costs) for form, cost in zip(found, costs, strict=True) if form.size.units]
            least += min(staying, default=0)
        return least


@dataclass(frozen=True)
class Allocated(Generic[F]):
    """The form of every block by name, their summed price, and a price that nothing within the limits falls below."""

    forms: dict[str, F]
    price: float
    bound: float


@dataclass(frozen=True)
class Option(Generic[F]):
    """A form of a block with its cost by each limit and its price."""

    form: F
    costs: tuple[int, ...]
    price: float


def cheapest(
    anatomy: Anatomy,
    limits: Sequence[Limit[F]],
    forms: Forms[F],
    allowed: Sizes,
    errors: Errors,
    price: Callable[[Block, F], float],
) -> Allocated[F]:
    """Return the form of every block with the lowest summed price within the limits.

    Under several limits it is the best one found, see multi_knapsack.py.

    Args:
        forms: of blocks.
        allowed: sizes of every block; `least` must be within each limit.
        errors: of removals, by block.
        price: of a block in a form; prices of blocks add up.

    Raises:
        InputError: no model was found that stays within all limits, or only one with too many sizes of attention to be
            served well.
    """
    chosen: dict[str, Option[F]] = {}
    bounds: list[float] = []

    def solve(sizes: Sizes) -> dict[str, Size]:
        choices = [_worth_it(block, limits, forms(sizes[block.name]), price) for block in anatomy.blocks]
        savings, wanted = _savings(choices, limits)
        found = multi_knapsack(savings, [[option.price for option in choice] for choice in choices], wanted)
        if found is None:
            first = not bounds and len(limits) > 1
            raise InputError(_together(limits, savings, wanted) if first else _unmet(anatomy, limits, sizes, forms))
        bounds.append(found.bound)
        for block, choice, option in zip(anatomy.blocks, choices, found.chosen, strict=True):
            chosen[block.name] = choice[option]
        return {name: option.form.size for name, option in chosen.items()}

    def solvable(sizes: Sizes) -> bool:
        alone = all(limit.least(anatomy, sizes, forms) <= limit.total for limit in limits)
        return alone and _is_possible(anatomy, limits, forms, sizes)

    servable(anatomy, allowed, errors, solve, solvable)
    total = math.fsum(option.price for option in chosen.values())
    logger.info(
        "the chosen sizes cost %.4g nats per token by the error curves; nothing within the budget costs less than %.4g",
        total,
        bounds[0],  # of all allowed sizes
    )
    return Allocated({name: option.form for name, option in chosen.items()}, total, bounds[0])


def check_together(anatomy: Anatomy, limits: Sequence[Limit[F]], forms: Forms[F], allowed: Sizes) -> None:
    """Refuse limits of which each can be met, but not all together. Raises InputError with what can be."""
    if not _is_possible(anatomy, limits, forms, allowed):
        savings, wanted = _savings(_unpriced(anatomy, limits, forms, allowed), limits)
        raise InputError(_together(limits, savings, wanted))


def _is_possible(anatomy: Anatomy, limits: Sequence[Limit[F]], forms: Forms[F], allowed: Sizes) -> bool:
    """Return whether a choice was found that meets all limits, each of which can be met alone."""
    if len(limits) == 1:
        return True
    savings, wanted = _savings(_unpriced(anatomy, limits, forms, allowed), limits)
    return is_possible(savings, wanted)


def _unpriced(anatomy: Anatomy, limits: Sequence[Limit[F]], forms: Forms[F], allowed: Sizes) -> list[list[Option[F]]]:
    return [_worth_it(block, limits, forms(allowed[block.name]), lambda *_: 0.0) for block in anatomy.blocks]


def _savings(
    choices: Sequence[Sequence[Option[F]]], limits: Sequence[Limit[F]]
) -> tuple[list[list[list[int]]], list[int]]:
    """Return what each option saves by each limit, relative to the dearest of its block, and what has to be saved."""
    savings, wanted = [], []
    for number, limit in enumerate(limits):
        costs = [[option.costs[number] for option in choice] for choice in choices]
        savings.append([[max(of_block) - cost for cost in of_block] for of_block in costs])
        wanted.append(max(limit.around + sum(map(max, costs)) - limit.total, 0))
    return savings, wanted


def _unmet(anatomy: Anatomy, limits: Sequence[Limit[F]], sizes: Sizes, forms: Forms[F]) -> str:
    """What to say if `servable` has restricted the sizes of attention, and then no choice is within the limits."""
    least = [limit.words(limit.least(anatomy, sizes, forms)) for limit in limits]
    return (
        f"the budget is {_listed(limits)}, and of what fits in it nothing can be served well: attention has more than "
        f"{HEAD_SHAPES} sizes; allow {' or '.join(least)}"
    )


def _together(limits: Sequence[Limit[F]], savings: Sequence[Sequence[Sequence[int]]], wanted: Sequence[int]) -> str:
    """What to say of limits that no choice was found to meet together: the least cost of each within the others."""
    least = []
    for own, limit in enumerate(limits):
        chosen = saving_most(savings, wanted, own)
        if chosen is not None:
            others = _listed([other for other in limits if other is not limit])
            missing = wanted[own] - sum(saved[option] for saved, option in zip(savings[own], chosen, strict=True))
            least.append(f"with {others}, at least {limit.words(limit.total + missing)}")
    return (
        f"the budget is {_listed(limits)}, and no sizes were found that meet all of it: "
        f"{'; '.join(least) or 'not even two of these limits together'}; allow more of one"
    )


def _listed(limits: Sequence[Limit[F]]) -> str:
    return " and ".join(limit.words(limit.total) for limit in limits)


def _worth_it(
    block: Block, limits: Sequence[Limit[F]], forms: Iterable[F], price: Callable[[Block, F], float]
) -> list[Option[F]]:
    """Return the Pareto-optimal options of a block in costs and price, lowest costs first."""
    found = [Option(form, tuple(limit.cost(block, form) for limit in limits), price(block, form)) for form in forms]
    found.sort(key=lambda option: (option.costs, option.price))
    values = np.array([(*option.costs, option.price) for option in found])
    return [option for place, option in enumerate(found) if not (values[:place] <= values[place]).all(axis=1).any()]
