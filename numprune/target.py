"""What the server that will run the result needs of its sizes. Pruning keeps to it, so nothing is found out afterwards.

The rules are vLLM's, for each layer on its own (its kernels and its tensor parallelism split heads and intermediate
channels evenly), and they hold for the other runtimes as well.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from numprune.anatomy import Anatomy, Block
from numprune.errors import InputError
from numprune.slices import GONE, Size

HEAD_SHAPES = 4  # distinct (query heads, KV heads) pairs; each more costs vLLM a metadata build in every step

Sizes = Mapping[str, Sequence[Size]]  # block name -> those it may be left with, ascending


@dataclass(frozen=True)
class Target:
    """A server's constraints.

    Attributes:
        align: intermediate sizes are multiples of it on every GPU (a model's own size may stay as it is).
        tensor_parallel: GPUs that share each layer.
        quantization_group: channels of a projection's input that share a scale; 1 where nothing will be quantized.
    """

    align: int = 8
    tensor_parallel: int = 1
    quantization_group: int = 1

    def __post_init__(self) -> None:
        for field in ("align", "tensor_parallel", "quantization_group"):
            value = getattr(self, field)
            if value < 1:
                raise InputError(f"{field} is {value}; it must be at least 1")


def allowed_sizes(anatomy: Anatomy, target: Target, *, skips: bool = False, stock: bool = False) -> Sizes:
    """Return the sizes that each block may be left with.

    Args:
        anatomy: of the model to prune.
        target: of the result.
        skips: a block may also lose all its units; its layer then passes the residual stream on.
        stock: only sizes that the architecture's own configuration holds.

    Raises:
        InputError: a block has no size that the target can run; names the block, its size and the rule.
    """
    return {block.name: _sizes(block, anatomy, target, skips, stock) for block in anatomy.blocks}


def nearest(counts: Sequence[int], exact: float) -> int:
    """Return the count nearest to `exact`; the larger one where two are equally near."""
    after = bisect_right(counts, exact)
    around = counts[max(after - 1, 0) : after + 1]
    return min(around, key=lambda count: (abs(count - exact), -count))


def _sizes(block: Block, anatomy: Anatomy, target: Target, skips: bool, stock: bool) -> list[Size]:
    if not block.units:
        return [GONE]
    if block.kind == "mlp":
        least = target.quantization_group * target.tensor_parallel
        step = math.lcm(target.align, target.quantization_group) * target.tensor_parallel
        widths = list(range(step, block.units + 1, step))
        if block.units % step and block.units % least == 0:
            widths.append(block.units)
        sizes = [Size(width) for width in widths]
        rule = f"a multiple of quantization_group * tensor_parallel = {least}"
    else:
        sizes = [
            size
            for groups in range(1, block.units + 1)
            if _splits(size := Size(groups, block.members), anatomy, target) and _may_have(block, size, anatomy, stock)
        ]
        rule = (
            f"heads that split evenly over tensor_parallel={target.tensor_parallel} (KV heads may be copied instead), "
            f"in groups of quantization_group={target.quantization_group} channels"
        )
    if not sizes:
        raise InputError(
            f"{block.name}: none of its sizes of up to {block.units} units suits the target, which needs {rule}; "
            "choose a smaller tensor_parallel or quantization_group"
        )
    return [GONE, *sizes] if skips else sizes


def _may_have(block: Block, size: Size, anatomy: Anatomy, stock: bool) -> bool:
    if size == block.size:
        return True
    return block.separable and (not stock or anatomy.stock_holds(block, size))


def _splits(size: Size, anatomy: Anatomy, target: Target) -> bool:
    groups, heads, parallel = size.units, size.units * size.members, target.tensor_parallel
    return (
        heads % parallel == 0
        and (groups % parallel == 0 or parallel % groups == 0)
        and heads * anatomy.head_dim % (target.quantization_group * parallel) == 0
    )
