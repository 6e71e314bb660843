"""The sizes that the target server supports. Pruning respects them, so problems do not show up only when serving.

The rules are vLLM's for a single layer (its kernels and its tensor parallelism divide heads and intermediate channels
evenly), and they suit the other runtimes as well.
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

HEAD_SHAPES = 4  # distinct (query heads, KV heads) pairs; each one costs vLLM a metadata build per step

Sizes = Mapping[str, Sequence[Size]]  # block name -> allowed sizes, ascending


@dataclass(frozen=True)
class Target:
    """The constraints of the target server.

    Attributes:
        align: intermediate sizes per GPU are multiples of this (an unpruned size may stay as it is).
        tensor_parallel: GPUs that share each layer.
        quantization_group: input channels of a projection that share a scale; 1 without quantization.
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
    """Return the allowed sizes of each block.

    Args:
        anatomy: of the model to prune.
        target: of the result.
        limits: of what may be pruned.
        stock: only sizes that the architecture's own configuration can represent.

    Raises:
        InputError: a block has no size that the target supports, or a protected block's size is not supported;
            names the block, its size and the rule. Also like `Limits.check`.
    """
    limits.check(anatomy)
    protected = limits.protected(anatomy)
    return {block.name: _sizes(block, anatomy, target, limits, protected, stock) for block in anatomy.blocks}


def nearest(counts: Sequence[int], exact: float) -> int:
    """Return the count nearest to `exact`; of two equally near ones, the larger."""
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
        # The grouped-expert kernels need rows of a multiple of 16 bytes.
        aligned = replace(target, align=math.lcm(target.align, 16 // anatomy.bytes_per_value))
        widths = _widths(block.members, aligned)
        sizes = [Size(*size) for size in product(range(block.routing.top_k, block.units + 1), widths)]
        rule = _rule_of_widths(target)
    else:
        members = dims_of_scores(block, target) if block.scores else range(1, block.members + 1)
        sizes = [
            size
            for size in (Size(*pair) for pair in product(range(1, block.units + 1), members))
            if _splits(block, size, anatomy, target) and _may_have(block, size, anatomy, stock)
        ]
        rule = (
            f"heads that split evenly over tensor_parallel={target.tensor_parallel} (KV heads may be replicated "
            f"instead), in groups of quantization_group={target.quantization_group} channels"
        )
    gone = () if block.routing else (GONE,)  # not all experts can be removed
    allowed = [size for size in (*gone, *sizes) if limits.allows(block, size, protected)]
    if not any(size.units for size in allowed):
        which = "that axes, keep and floors allow" if sizes else f"of up to {block.units} units"
        raise InputError(
            f"{block.name}: none of its sizes {which} suits the target, which needs {rule}; "
            "choose a smaller tensor_parallel or quantization_group"
        )
    return allowed


def dims_of_scores(block: Block, target: Target) -> list[int]:
    """Return the allowed dimensions of queries and keys: multiples of `align`, and the block's own."""
    return _widths(block.members, Target(target.align))


def _widths(width: int, target: Target) -> list[int]:
    """Return the allowed numbers of channels of an MLP, or an expert, of this width."""
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


def _splits(block: Block, size: Size, anatomy: Anatomy, target: Target) -> bool:
    groups, heads, parallel = size.units, block.heads(size), target.tensor_parallel
    return (
        heads % parallel == 0
        and _shared(groups, parallel)
        and heads * anatomy.head_dim % (target.quantization_group * parallel) == 0
    )


def _shared(groups: int, parallel: int) -> bool:
    """Return whether each GPU gets the same number of KV heads or, with fewer heads than GPUs, a copy of one."""
    return groups % parallel == 0 or parallel % groups == 0


def not_split(anatomy: Anatomy, tensor_parallel: int) -> list[str]:
    """Return the sizes that this number of GPUs cannot share evenly, like "layer 3 num_attention_heads=6"."""
    family = FAMILIES[anatomy.family]
    found = []
    for block in anatomy.blocks:
        groups, heads = block.units, block.heads(block.size)
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
