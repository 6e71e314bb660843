"""What the server that will run the result needs of its sizes. Pruning keeps to it, so nothing is found out afterwards.

The rules are vLLM's, for each layer on its own (its kernels and its tensor parallelism split heads and intermediate
channels evenly), and they hold for the other runtimes as well.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from numprune.axes import Limits
from numprune.blocks import Anatomy, Block
from numprune.errors import InputError
from numprune.families import FAMILIES
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


def allowed_sizes(anatomy: Anatomy, target: Target, limits: Limits, *, stock: bool = False) -> Sizes:
    """Return the sizes that each block may be left with.

    Args:
        anatomy: of the model to prune.
        target: of the result.
        limits: of what may be pruned.
        stock: only sizes that the architecture's own configuration holds.

    Raises:
        InputError: a block has no size that the target can run, or not its own, which it must keep; names the block,
            its size and the rule. Also as `Limits.check`.
    """
    limits.check(anatomy)
    protected = limits.protected(anatomy)
    return {block.name: _sizes(block, anatomy, target, limits, protected, stock) for block in anatomy.blocks}


def nearest(counts: Sequence[int], exact: float) -> int:
    """Return the count nearest to `exact`; the larger one where two are equally near."""
    after = bisect_right(counts, exact)
    around = counts[max(after - 1, 0) : after + 1]
    return min(around, key=lambda count: (abs(count - exact), -count))


def _sizes(
    block: Block, anatomy: Anatomy, target: Target, limits: Limits, protected: frozenset[str], stock: bool
) -> list[Size]:
    if not block.units:
        return [GONE]
    if block.kind == "mlp":
        sizes = [Size(width) for width in _widths(block.units, target)]
        rule = _rule_of_widths(target)
    elif block.routing is not None:
        # The kernels that take all experts at once want rows of whole 16 bytes.
        aligned = replace(target, align=math.lcm(target.align, 16 // anatomy.bytes_per_value))
        widths = _widths(block.members, aligned)
        sizes = [Size(*size) for size in product(range(block.routing.top_k, block.units + 1), widths)]
        rule = _rule_of_widths(target)
    else:
        sizes = [
            Size(groups, heads)
            for groups in range(1, block.units + 1)
            for heads in range(1, block.members + 1)
            if _splits(Size(groups, heads), anatomy, target) and _may_have(block, Size(groups, heads), anatomy, stock)
        ]
        rule = (
            f"heads that split evenly over tensor_parallel={target.tensor_parallel} (KV heads may be replicated "
            f"instead), in groups of quantization_group={target.quantization_group} channels"
        )
    gone = () if block.routing else (GONE,)  # experts do not go as a whole
    allowed = [size for size in (*gone, *sizes) if limits.allows(block, size, protected)]
    if not any(size.units for size in allowed):
        which = "that axes, keep and floors allow" if sizes else f"of up to {block.units} units"
        raise InputError(
            f"{block.name}: none of its sizes {which} suits the target, which needs {rule}; "
            "choose a smaller tensor_parallel or quantization_group"
        )
    return allowed


def _widths(width: int, target: Target) -> list[int]:
    """Return the numbers of channels that an MLP, or an expert, of this width may be left with."""
    step = math.lcm(target.align, target.quantization_group) * target.tensor_parallel
    widths = list(range(step, width + 1, step))
    if width % step and width % (target.quantization_group * target.tensor_parallel) == 0:
        widths.append(width)
    return widths


def _rule_of_widths(target: Target) -> str:
    return f"a multiple of quantization_group * tensor_parallel = {target.quantization_group * target.tensor_parallel}"


def _may_have(block: Block, size: Size, anatomy: Anatomy, stock: bool) -> bool:
    if size == block.size:
        return True
    return block.separable and (not stock or anatomy.stock_holds(block, size))


def _splits(size: Size, anatomy: Anatomy, target: Target) -> bool:
    groups, heads, parallel = size.units, size.units * size.members, target.tensor_parallel
    return (
        heads % parallel == 0
        and _shared(groups, parallel)
        and heads * anatomy.head_dim % (target.quantization_group * parallel) == 0
    )


def _shared(groups: int, parallel: int) -> bool:
    """Whether GPUs have equally many KV heads each, or where there are fewer heads, each the copy of one."""
    return groups % parallel == 0 or parallel % groups == 0


def not_split(anatomy: Anatomy, tensor_parallel: int) -> list[str]:
    """Return the sizes that so many GPUs cannot share evenly, each like "layer 3 num_attention_heads=6"."""
    family = FAMILIES[anatomy.family]
    found = []
    for block in anatomy.blocks:
        groups, heads = block.units, block.units * block.members
        if block.kind == "mlp":
            counts = {block.field: block.units} if block.units % tensor_parallel else {}
        elif family.experts and block.kind == "experts":
            counts = {family.experts.width: block.members} if block.members % tensor_parallel else {}
        else:
            counts = {family.heads: heads} if heads % tensor_parallel else {}
            if family.kv_heads and groups and not _shared(groups, tensor_parallel):
                counts[family.kv_heads] = groups
        found += [f"layer {block.layer} {field}={count}" for field, count in counts.items()]
    return found
