"""Units and bits in one budget of bytes: choose the size and the scheme of each block.

Removing units and rounding the rest have the same second-order price in nats, 1/2 tr(S E[dy dy^T]) for an error dy at a
block's output (curves.py, pricing.py). Both errors are those remaining after the fit of the block's last projection.
The two prices are assumed to add up, as are those of different blocks, and the rounding price of a pruned block to be
proportional to its remaining parameters.

A block's projections share a scheme, because servers fuse those of attention and those of an MLP.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from numprune.blocks import Anatomy, Block
from numprune.byte_budget import ByteBudget
from numprune.cheapest import Limit, cheapest
from numprune.curves import Errors, error_at
from numprune.errors import InputError
from numprune.plans import Plan
from numprune.quantization.compressed_tensors import bytes_of
from numprune.quantization.linears import projections
from numprune.quantization.schemes import GROUP_SIZES, Scheme
from numprune.slices import Size
from numprune.target import Sizes, Target

Level = Scheme | None  # None: not quantized
Rounding = Mapping[str, Mapping[Scheme, float]]  # block name -> cost of rounding the whole block, in nats per token

_DTYPES = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}  # by the bytes of a value


@dataclass(frozen=True)
class Form:
    """The size and the scheme of a block."""

    size: Size
    level: Level


def levels_of(budget: ByteBudget, target: Target) -> tuple[Level, ...]:
    """Return the allowed schemes of a block, with the target's group size. Raises InputError."""
    group = target.quantization_group
    if "w4a16" in budget.levels and group not in GROUP_SIZES:
        raise InputError(
            f"quantization_group is {group}; for blocks in w4a16 it must be one of {', '.join(map(str, GROUP_SIZES))}"
        )
    return tuple(name and Scheme(name, group if name == "w4a16" else None) for name in budget.levels)


def planned_schemes(plan: Plan) -> dict[str, Scheme]:
    """Return the scheme of each block quantized by a plan, by name in the pruned model."""
    gone, group = set(plan.dropped_layers()), plan.target.quantization_group
    found: dict[str, Scheme] = {}
    for name, scheme in plan.schemes().items():
        _, number, kind = name.split(".")
        left = int(number) - sum(layer < int(number) for layer in gone)
        found[f"layers.{left}.{kind}"] = Scheme(scheme, group if scheme == "w4a16" else None)
    return found


def block_bytes(block: Block, form: Form, value: int) -> int:
    """Return the bytes of a block's tensors in a checkpoint: values, scales, shapes.

    Args:
        value: bytes of a value that is not quantized.
    """
    left, dtype = block.resized(form.size), _DTYPES[value]
    matrices = {f"{path}.weight" for one in projections(left) for path in one.paths} if form.level else set()
    total = 0
    for name, shape in left.tensors().items():
        if form.level and name in matrices:
            total += bytes_of(form.level, shape, dtype)
        else:
            total += math.prod(shape) * value
    return total


def model_bytes(anatomy: Anatomy, forms: Mapping[str, Form], budget: ByteBudget) -> int:
    """Return the bytes of the whole model's weights."""
    return budget.around + sum(block_bytes(block, forms[block.name], budget.value) for block in anatomy.blocks)


def check_reachable(anatomy: Anatomy, budget: ByteBudget, levels: Sequence[Level], allowed: Sizes) -> None:
    """Refuse a budget that no choice meets. Raises InputError with the smallest possible size."""
    least = _limit(budget, levels).least(anatomy, allowed)
    if least <= budget.limit:
        return
    *others, last = (_named(level) for level in levels)
    names = f"{', '.join(others)} or {last}" if others else last
    fewest = any(level is not None and level.bits == 4 for level in levels)
    remedy = "lower floors, a shorter keep or a smaller align" if fewest else "or fewer bits"
    raise InputError(
        f"the budget is {budget.limit:,} bytes, but embeddings, norms and the smallest allowed size of every block "
        f"in {names} take {least:,}; allow more bytes, {remedy}"
    )


def by_bytes(
    anatomy: Anatomy, budget: ByteBudget, levels: Sequence[Level], allowed: Sizes, errors: Errors, rounding: Rounding
) -> dict[str, Form]:
    """Return the cheapest size and level of every block within the budget.

    Args:
        levels: the allowed schemes of a block.
        allowed: sizes of every block, divisible by the groups of every level.
        errors: of removals, by block.
        rounding: of every block, for every scheme among the levels.

    Raises:
        InputError: the budget cannot be met.
    """
    check_reachable(anatomy, budget, levels, allowed)
    return cheapest(
        anatomy, _limit(budget, levels), allowed, errors, lambda block, form: _price(block, form, errors, rounding)
    )


def _limit(budget: ByteBudget, levels: Sequence[Level]) -> Limit[Form]:
    return Limit(
        budget.limit,
        budget.around,
        lambda sizes: _forms(sizes, levels),
        lambda block, form: block_bytes(block, form, budget.value),
        lambda amount: f"{amount:,} bytes",
    )


def price_of(anatomy: Anatomy, forms: Mapping[str, Form], errors: Errors, rounding: Rounding) -> float:
    """Return the price of these forms in nats per token: for choosing, not a prediction of the loss."""
    return math.fsum(_price(block, forms[block.name], errors, rounding) for block in anatomy.blocks)


def _forms(sizes: Sequence[Size], levels: Sequence[Level]) -> Iterator[Form]:
    for size in sizes:
        for level in levels if size.units else (None,):
            yield Form(size, level)


def _named(level: Level) -> str:
    """Return the level in words, for a list."""
    if level is None:
        return "the stored precision"
    return level.name if level.group_size is None else f"{level.name} (groups of {level.group_size})"


def _price(block: Block, form: Form, errors: Errors, rounding: Rounding) -> float:
    price = error_at(errors, block, form.size)
    if form.level is None:
        return price
    return price + rounding[block.name][form.level] * block.parameters(form.size) / block.parameters(block.size)
