"""The size and the quantization of each block within one or several budgets: bytes of weights, time, KV cache.

Removing units and rounding the rest have the same second-order price in nats, 1/2 tr(S E[dy dy^T]) for an error dy at a
block's output (curves.py, quantization/pricing.py). Both errors are those remaining after the fit of the block's last
projection. The two prices are assumed to add up, as are those of different blocks.
"""

from collections.abc import Iterator, Sequence

from numprune.blocks import Anatomy
from numprune.byte_budget import ByteBudget
from numprune.cache_budget import KvBudget
from numprune.cheapest import Allocated, Limit, cheapest, check_together
from numprune.curves import Errors
from numprune.errors import InputError
from numprune.quantization.allocation import Form, Level, Rounding, block_bytes, form_price, levels_of
from numprune.slices import Size
from numprune.target import Sizes, Target
from numprune.time_budget import PER_MS, TimeBudget, measured_sizes

Budget = ByteBudget | TimeBudget | KvBudget  # at most one of each


def by_budgets(
    anatomy: Anatomy, budgets: Sequence[Budget], target: Target, allowed: Sizes, errors: Errors, rounding: Rounding
) -> Allocated[Form]:
    """Return the cheapest size and level of every block within all budgets.

    Args:
        allowed: sizes of every block, divisible by the groups of every level of a budget of bytes.
        errors: of removals, by block.
        rounding: of every block, for every scheme among those levels.

    Raises:
        InputError: the budgets cannot be met, or a block has no size that a budget of time measured.
    """
    levels = _levels(budgets, target)
    allowed = sizes_within(anatomy, budgets, allowed)
    limits = [_limit(anatomy, budget) for budget in budgets]
    for budget, limit in zip(budgets, limits, strict=True):
        _check_reachable(anatomy, budget, limit, levels, allowed)
    return cheapest(
        anatomy,
        limits,
        lambda sizes: _forms(sizes, levels),
        allowed,
        errors,
        lambda block, form: form_price(block, form, errors, rounding),
    )


def check_budgets(
    anatomy: Anatomy, budgets: Sequence[Budget], target: Target, allowed: Sizes, *, smaller: bool = False
) -> None:
    """Refuse budgets that the model meets as it is, or that no choice meets. Raises InputError.

    Of times that are not known yet, nothing is checked.

    Args:
        smaller: the model has lost layers, blocks or coordinates already, which may be enough.
    """
    levels = _levels(budgets, target)
    if not smaller:
        check_needed(anatomy, budgets, target)
    budgets = _known(budgets)
    if not budgets:
        return
    _check_measured(anatomy, budgets)
    allowed = sizes_within(anatomy, budgets, allowed)
    limits = [_limit(anatomy, budget) for budget in budgets]
    for budget, limit in zip(budgets, limits, strict=True):
        _check_reachable(anatomy, budget, limit, levels, allowed)
    check_together(anatomy, limits, lambda sizes: _forms(sizes, levels), allowed)


def check_needed(anatomy: Anatomy, budgets: Sequence[Budget], target: Target) -> None:
    """Refuse budgets that the model meets as it is, if all times are known. Raises InputError."""
    if len(_known(budgets)) < len(budgets):
        return
    _check_measured(anatomy, budgets)
    limits = [_limit(anatomy, budget) for budget in budgets]
    costs = [_whole(anatomy, limit) for limit in limits]
    met = all(cost <= limit.total for cost, limit in zip(costs, limits, strict=True))
    if met and None in _levels(budgets, target):
        asked = " and ".join(limit.words(limit.total) for limit in limits)
        found = " and ".join(limit.words(cost) for cost, limit in zip(costs, limits, strict=True))
        raise InputError(
            f"the budget is {asked}, and the model takes {found} as it is: nothing has to go; choose a smaller budget"
        )


def _known(budgets: Sequence[Budget]) -> list[Budget]:
    """Return the budgets without one of times that are not known yet."""
    return [budget for budget in budgets if not isinstance(budget, TimeBudget) or budget.times]


def _check_measured(anatomy: Anatomy, budgets: Sequence[Budget]) -> None:
    for budget in budgets:
        if isinstance(budget, TimeBudget):
            budget.check_measured(anatomy)


def sizes_within(anatomy: Anatomy, budgets: Sequence[Budget], allowed: Sizes) -> Sizes:
    """Return the allowed sizes whose cost is known. Raises InputError if a block has none."""
    for budget in budgets:
        if isinstance(budget, TimeBudget):
            allowed = measured_sizes(anatomy, allowed, budget)
    return allowed


def _levels(budgets: Sequence[Budget], target: Target) -> Sequence[Level]:
    for budget in budgets:
        if isinstance(budget, ByteBudget):
            return levels_of(budget, target)
    return (None,)


def _limit(anatomy: Anatomy, budget: Budget) -> Limit[Form]:
    if isinstance(budget, ByteBudget):
        value = budget.value
        return Limit(
            budget.limit,
            budget.around,
            lambda block, form: block_bytes(block, form, value),
            lambda amount: f"{amount:,} bytes",
        )
    if isinstance(budget, TimeBudget):
        return Limit(
            budget.limit,
            budget.around(anatomy),
            lambda block, form: budget.cost(block, form.size),
            lambda amount: f"{amount / PER_MS:.4g} ms",
        )
    return Limit(
        budget.limit,
        0,
        lambda block, form: budget.cost(anatomy, block, form.size),
        lambda amount: f"{amount:,} bytes of KV cache per token",
    )


def _whole(anatomy: Anatomy, limit: Limit[Form]) -> int:
    """Return the cost of the model as it is."""
    return limit.around + sum(limit.cost(block, Form(block.size, None)) for block in anatomy.blocks)


def _check_reachable(
    anatomy: Anatomy, budget: Budget, limit: Limit[Form], levels: Sequence[Level], allowed: Sizes
) -> None:
    """Refuse a budget that no choice meets, even without the others. Raises InputError with the least."""
    least = limit.least(anatomy, allowed, lambda sizes: _forms(sizes, levels))
    if least <= limit.total:
        return
    if isinstance(budget, TimeBudget):
        raise InputError(
            f"the budget is {budget}, but embeddings, head and the quickest measured size of every block take "
            f"{limit.words(least)} of {limit.words(_whole(anatomy, limit))}; allow more time, or measure smaller sizes"
        )
    if isinstance(budget, KvBudget):
        raise InputError(
            f"the budget is {budget}, but the smallest allowed attention of every layer takes {least:,}; allow more "
            "bytes, lower floors or a shorter keep"
        )
    *others, last = (_named(level) for level in levels)
    names = f"{', '.join(others)} or {last}" if others else last
    fewest = any(level is not None and level.bits == 4 for level in levels)
    remedy = "lower floors, a shorter keep or a smaller align" if fewest else "or fewer bits"
    raise InputError(
        f"the budget is {budget.limit:,} bytes, but embeddings, norms and the smallest allowed size of every block "
        f"in {names} take {least:,}; allow more bytes, {remedy}"
    )


def _forms(sizes: Sequence[Size], levels: Sequence[Level]) -> Iterator[Form]:
    for size in sizes:
        for level in levels if size.units else (None,):
            yield Form(size, level)


def _named(level: Level) -> str:
    """Return the level in words, for a list."""
    if level is None:
        return "the stored precision"
    return level.name if level.group_size is None else f"{level.name} (groups of {level.group_size})"
