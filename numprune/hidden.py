"""Cut the hidden size: remove coordinates of the residual stream from everything that reads or writes it.

The stream may be rotated first (rotation.py), so that the removed coordinates are directions of the model's own stream.

The narrower model computes what the model does with these coordinates zero throughout. An RMS norm of d coordinates
divides by sqrt(sum x^2 / d + eps). With the d' kept ones and eps' = eps d / d', it divides by sqrt(d / d') times that,
which gains multiplied by sqrt(d / d') make up for. Norms of queries and keys share eps in the configuration and so get
eps', too; their squares are so much larger that only rounding changes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import lcm, sqrt
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

from numprune.blocks import Anatomy, Block
from numprune.errors import InputError
from numprune.families import FAMILIES
from numprune.target import Target, nearest

if TYPE_CHECKING:
    from torch import Tensor, nn

EPSILON = "rms_norm_eps"  # field of the configuration, in every family that `check_narrowable` accepts

Basis = Literal["fisher", "coordinates"]  # see basis.py
BASES: tuple[Basis, ...] = get_args(Basis)


class Width(NamedTuple):
    """A smaller hidden size, and what it keeps."""

    hidden_size: int
    basis: Basis


@dataclass
class Narrowing:
    """How a model's residual stream becomes narrower. H is its hidden size, K that of the result.

    Attributes:
        kept: (K,) indices of the kept coordinates, ascending.
        rotation: (H, H) float64, orthogonal: the coordinates are those of x Q for a stream x. None: the model's own.
        head: (H, K) float64: by this the output matrix, rotated and with the last norm's gain folded in, is multiplied.
            Pruning sets it if it refits that matrix. None: the matrix only loses columns.
    """

    kept: "Tensor"
    rotation: "Tensor | None" = None
    head: "Tensor | None" = None

    def around(self, name: str, tensor: "Tensor", gain: "Tensor", anatomy: Anatomy) -> "Tensor":
        """Return a tensor outside the layers, or some rows of it, for the narrower model.

        Args:
            name: of the tensor.
            gain: (H,) of the last norm.
        """
        is_output = name in FAMILIES[anatomy.family].untied
        if name == anatomy.final_gain:
            is_folded = self.rotation is not None or self.head is not None
            return _narrow(tensor.new_ones(tensor.shape) if is_folded else tensor, -1, self.kept, is_gain=True)
        if self.rotation is None and not (is_output and self.head is not None):
            return _narrow(tensor, -1, self.kept, is_gain=False)
        values = tensor.double()
        if is_output:
            values = values * gain.to(values)
        if self.rotation is not None:
            values = values @ self.rotation.to(values)
        left = values @ self.head.to(values) if is_output and self.head is not None else values[..., self.kept]
        return left.to(tensor.dtype)


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
        raise InputError(
            f"the hidden size of {family.name} cannot be cut: {reason}; leave out hidden_size, or the axis hidden-size"
        )


def check_hidden_size(anatomy: Anatomy, hidden_size: int, target: Target) -> None:
    """Refuse a hidden size that the model cannot have, or the target does not support. Raises InputError."""
    check_narrowable(anatomy)
    sizes = hidden_sizes(anatomy, target)
    if hidden_size not in sizes:
        raise InputError(
            f"the hidden size would be {hidden_size}, and the target needs {sizes[0]} or a multiple of it; the "
            f"nearest: {nearest(sizes, hidden_size)}"
        )


def narrowed(anatomy: Anatomy, hidden_size: int, basis: Basis) -> Anatomy:
    """Return the anatomy after cutting the hidden size. A rotation unties the output matrix, see rotation.py."""
    return (anatomy.untied() if basis == "fisher" else anatomy).narrowed(hidden_size)


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


def _narrow(tensor: "Tensor", dim: int, kept: "Tensor", *, is_gain: bool) -> "Tensor":
    left = tensor.index_select(dim, kept.to(tensor.device))
    return left * sqrt(tensor.shape[dim] / left.shape[dim]) if is_gain else left


def outputs_of(layer: "nn.Module", block: Block) -> "list[tuple[nn.Parameter, int]]":
    """Return the parameters with which a block writes to the residual stream, and their hidden dimensions."""
    dims = {part.tensor: part.hidden_dim for part in block.slices if part.tensor.startswith(block.reader.tensor)}
    if block.consumer_bias:
        dims[f"{block.consumer}.bias"] = 0
    return [(layer.get_parameter(name), dim) for name, dim in dims.items() if dim is not None]


def inputs_of(block: Block) -> dict[str, int]:
    """Return the parameters with which a block reads the residual stream behind a norm -> their hidden dimensions."""
    dims = {part.tensor: part.hidden_dim for part in block.slices if not part.tensor.startswith(block.reader.tensor)}
    dims |= {name: len(shape) - 1 for name, shape in block.shared.items() if len(shape) > 1}
    return {name: dim for name, dim in dims.items() if dim is not None}


def norm_of(blocks: Sequence[Block], block: Block) -> str:
    """Return the path of the norm that a block of a layer reads through; `blocks`: all of the layer.

    Blocks side by side share one, which belongs to the last of them.
    """
    (gain,) = next(other.norms for other in blocks[blocks.index(block) :] if other.norms)
    return gain.removesuffix(".weight")


def silence(layer: "nn.Module", block: Block, gone: "Tensor") -> None:
    """Make the block write zero to the coordinates `gone`, in place; call it without gradients."""
    for parameter, dim in outputs_of(layer, block):
        parameter.index_fill_(dim, gone.to(parameter.device), 0)
