"""The forms of a block, its size and its scheme: their bytes, and their prices.

The rounding price of a pruned block is assumed to be proportional to its remaining parameters. A block's projections
share a scheme, because servers fuse those of attention and those of an MLP.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from numprune.blocks import Anatomy, Block
from numprune.byte_budget import ByteBudget
from numprune.curves import Errors, error_at
from numprune.plans import Plan
from numprune.quantization.compressed_tensors import bytes_of
from numprune.quantization.linears import projections
from numprune.quantization.schemes import Scheme, in_groups
from numprune.slices import Size
from numprune.target import Target

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
    return tuple(name and in_groups(name, target.quantization_group) for name in budget.levels)


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


def price_of(anatomy: Anatomy, forms: Mapping[str, Form], errors: Errors, rounding: Rounding) -> float:
    """Return the price of these forms in nats per token: for choosing, not a prediction of the loss."""
    return math.fsum(form_price(block, forms[block.name], errors, rounding) for block in anatomy.blocks)


def form_price(block: Block, form: Form, errors: Errors, rounding: Rounding) -> float:
    """Return the price of a block in a form, in nats per token."""
    price = error_at(errors, block, form.size)
    if form.level is None:
        return price
    return price + rounding[block.name][form.level] * block.parameters(form.size) / block.parameters(block.size)
