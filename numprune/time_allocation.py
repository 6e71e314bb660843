"""Sizes in a budget of time: the same choice as in one of bytes, with measured latencies as the cost."""

from typing import NamedTuple

from numprune.blocks import Anatomy
from numprune.cheapest import Limit, cheapest
from numprune.curves import Errors, error_at
from numprune.errors import InputError
from numprune.slices import Size
from numprune.target import Sizes
from numprune.time_budget import PER_MS, TimeBudget


class _Sized(NamedTuple):
    """What a block can become."""

    size: Size


def measured_sizes(anatomy: Anatomy, allowed: Sizes, budget: TimeBudget) -> Sizes:
    """Return the allowed sizes that were measured. Raises InputError if a block has none."""
    found = {
        block.name: [size for size in allowed[block.name] if budget.measured(block, size)] for block in anatomy.blocks
    }
    for block in anatomy.blocks:
        if not found[block.name] or (block.units and not any(size.units for size in found[block.name])):
            raise InputError(
                f"timings: none of the allowed sizes of {block.name} was measured; {budget.missing(block)}"
            )
    return found


def check_time(anatomy: Anatomy, allowed: Sizes, budget: TimeBudget) -> None:
    """Refuse a budget that the model meets as it is, or that no choice meets. Raises InputError."""
    limit, whole = _limit(budget), budget.predicted(anatomy).ms
    if whole <= budget.limit_ms:
        raise InputError(
            f"the budget is {budget}, and by the timings the model takes {whole:.4g} ms as it is: nothing has to go; "
            "choose a smaller budget"
        )
    least = limit.least(anatomy, measured_sizes(anatomy, allowed, budget))
    if least > limit.total:
        raise InputError(
            f"the budget is {budget}, but embeddings, head and the quickest measured size of every block take "
            f"{limit.words(least)} of {whole:.4g} ms; allow more time, or measure smaller sizes"
        )


def by_time(anatomy: Anatomy, budget: TimeBudget, allowed: Sizes, errors: Errors) -> dict[str, Size]:
    """Return the cheapest size of every block within the budget.

    Args:
        allowed: measured sizes of every block.
        errors: of removals, by block.

    Raises:
        InputError: the budget cannot be met.
    """
    check_time(anatomy, allowed, budget)
    found = cheapest(anatomy, _limit(budget), allowed, errors, lambda block, form: error_at(errors, block, form.size))
    return {name: form.size for name, form in found.items()}


def _limit(budget: TimeBudget) -> Limit[_Sized]:
    """Return the limit in nanoseconds."""
    return Limit(
        budget.limit,
        budget.around,
        lambda sizes: map(_Sized, sizes),
        lambda block, form: budget.cost(block, form.size),
        lambda amount: f"{amount / PER_MS:.4g} ms",
    )
