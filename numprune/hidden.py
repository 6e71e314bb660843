"""Cut the hidden size: remove coordinates of the residual stream from everything that reads or writes it.

The narrower model computes what the model does with these coordinates zero throughout. An RMS norm of d coordinates
divides by sqrt(sum x^2 / d + eps). With the d' kept ones and eps' = eps d / d', it divides by sqrt(d / d') times that,
which gains multiplied by sqrt(d / d') make up for. Norms of queries and keys share eps in the configuration and so get
eps', too; their squares are so much larger that only rounding changes.
"""

from collections.abc import Mapping
from math import lcm, sqrt
from typing import TYPE_CHECKING

from numprune.blocks import Anatomy, Block
from numprune.errors import InputError
from numprune.families import FAMILIES
from numprune.target import Target

if TYPE_CHECKING:
    from torch import Tensor, nn

EPSILON = "rms_norm_eps"  # field of the configuration, in every family that `check_narrowable` accepts


def check_narrowable(anatomy: Anatomy) -> None:
    """Refuse a family whose stock models cannot have some of their coordinates removed. Raises InputError."""
    family = FAMILIES[anatomy.family]
    wirings = filter(None, (family.attention, family.mlp, family.shared))
    reason = None
    if family.norm_bias:
        reason = "its layer norms subtract the mean over all coordinates"
    elif family.stock_heads == "all":
        reason = "its configuration derives the head size from the hidden size"
    elif any(wiring.norm_behind and wiring.norms for wiring in wirings):
        reason = "it norms the outputs of its blocks over all coordinates"
    elif family.scales_embeddings:
        reason = "it multiplies embeddings by the square root of the hidden size"
    if reason:
        raise InputError(f"axes: the hidden size of {family.name} cannot be cut: {reason}; leave out hidden-size")


def hidden_sizes(anatomy: Anatomy, target: Target) -> list[int]:
    """Return the hidden sizes that the target supports, ascending, up to the model's own."""
    step = lcm(target.align, target.quantization_group)
    return [*range(step, anatomy.hidden_size, step), anatomy.hidden_size]


def ratio_beside(ratio: float, whole: float, left: float) -> float:
    """Return the share of `left` to remove so that `ratio` of `whole` is removed, 0 if the rest is enough."""
    return max(0.0, 1 - (1 - ratio) * whole / left)


def removed(kept: "Tensor", hidden_size: int) -> "Tensor":
    """Return the indices of the coordinates that are not `kept`, ascending."""
    mask = kept.new_ones(hidden_size).bool()
    mask[kept] = False
    return mask.nonzero().flatten()


def narrow_block(state: Mapping[str, "Tensor"], block: Block, kept: "Tensor") -> "dict[str, Tensor]":
    """Return the block's tensors of a layer's `state` that have the hidden size, with the coordinates `kept` only."""
    dims = {part.tensor: part.hidden_dim for part in block.slices}
    dims |= dict.fromkeys((name for name in block.shared if name not in block.head_norms), -1)
    dims[f"{block.consumer}.bias"] = -1  # compensation may have added it
    return {
        name: _narrow(state[name], dim, kept, is_gain=name in block.norms)
        for name, dim in dims.items()
        if dim is not None and name in state
    }


def narrow_around(name: str, tensor: "Tensor", anatomy: Anatomy, kept: "Tensor") -> "Tensor":
    """Return a tensor outside the layers, or some rows of it, with the coordinates `kept` only."""
    return _narrow(tensor, -1, kept, is_gain=name == f"{FAMILIES[anatomy.family].final_norm}.weight")


def _narrow(tensor: "Tensor", dim: int, kept: "Tensor", *, is_gain: bool) -> "Tensor":
    left = tensor.index_select(dim, kept.to(tensor.device))
    return left * sqrt(tensor.shape[dim] / left.shape[dim]) if is_gain else left


def outputs_of(layer: "nn.Module", block: Block) -> "list[tuple[nn.Parameter, int]]":
    """Return the parameters with which a block writes to the residual stream, and their hidden dimensions."""
    dims = {part.tensor: part.hidden_dim for part in block.slices if part.tensor.startswith(block.reader.tensor)}
    if block.consumer_bias:
        dims[f"{block.consumer}.bias"] = 0
    return [(layer.get_parameter(name), dim) for name, dim in dims.items() if dim is not None]


def silence(layer: "nn.Module", block: Block, gone: "Tensor") -> None:
    """Make the block write zero to the coordinates `gone`, in place; call it without gradients."""
    for parameter, dim in outputs_of(layer, block):
        parameter.index_fill_(dim, gone, 0)
