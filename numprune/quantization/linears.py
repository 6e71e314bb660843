"""Which matrices are quantized: the projections of the blocks. Embeddings, heads, norms and routers are not."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, cast

from numprune.blocks import Anatomy, Block
from numprune.dtypes import BYTES, name_of
from numprune.errors import InputError
from numprune.families import FAMILIES
from numprune.quantization.compressed_tensors import CONFIG_FIELD, REMEDY, QuantizationConfig, bytes_of
from numprune.quantization.schemes import GROUP_SIZES, BlockSchemes, Scheme, listed, of_block

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class Projections:
    """Linear layers of a block with the same inputs, by path in the layer."""

    block: Block
    paths: tuple[str, ...]
    inputs: int
    read_units: bool  # they read the block's units, not the stream: tensor parallelism splits their inputs


def projections(block: Block) -> tuple[Projections, ...]:
    """Return the layers that write the block's units, then the one that reads them; none for experts."""
    if not block.units or block.routing is not None:
        return ()
    writers = tuple(part for part in block.writers if part.width is not None)
    assert writers[0].width is not None
    return (
        Projections(block, tuple(_path(part.tensor) for part in writers), writers[0].width, read_units=False),
        Projections(block, (_path(block.reader.tensor),), block.channels, read_units=True),
    )


def linear_of(layer: "nn.Module", path: str) -> "nn.Linear":
    """Return a projection in its decoder layer."""
    return cast("nn.Linear", layer.get_submodule(path))


def quantized_tensors(anatomy: Anatomy) -> Iterator[str]:
    """Yield the names of all quantizable matrices of the model."""
    for block in anatomy.blocks:
        yield from tensors_of_block(block)


def bytes_saved(anatomy: Anatomy, scheme: Scheme, dtype: "torch.dtype") -> int:
    """Return the bytes saved by quantizing the matrices of a checkpoint stored in `dtype`."""
    return sum(bytes_saved_in(block, scheme, dtype) for block in anatomy.blocks)


def bytes_saved_in(block: Block, scheme: Scheme, dtype: "torch.dtype | str") -> int:
    """Return the bytes saved by quantizing a block's matrices; `dtype`: torch's, or its name."""
    shapes = block.tensors()
    matrices = [shapes[f"{path}.weight"] for found in projections(block) for path in found.paths]
    return sum(prod(shape) * BYTES[name_of(dtype)] - bytes_of(scheme, shape, dtype) for shape in matrices)


def tensors_of_block(block: Block) -> Iterator[str]:
    """Yield the full names of the block's quantizable matrices."""
    for found in projections(block):
        yield from (f"{block.path}.{path}.weight" for path in found.paths)


def schemes_by_tensor(anatomy: Anatomy, schemes: BlockSchemes) -> dict[str, Scheme]:
    """Return name -> scheme of every quantized matrix."""
    chosen = ((block, of_block(schemes, block.name)) for block in anatomy.blocks)
    return {name: scheme for block, scheme in chosen if scheme is not None for name in tensors_of_block(block)}


def schemes_by_block(anatomy: Anatomy, found: QuantizationConfig) -> dict[str, Scheme]:
    """Return the scheme of every block that a config.json quantizes, by the block's name.

    Raises:
        InputError: the projections of a block have different schemes.
    """
    blocks: dict[str, Scheme] = {}
    for block in anatomy.blocks:
        of_matrices = (found.scheme(name.removesuffix(".weight")) for name in tensors_of_block(block))
        schemes = {scheme for scheme in of_matrices if scheme is not None}
        if len(schemes) > 1:
            raise InputError(
                f"config.json: {CONFIG_FIELD}: the projections of {block.name} have different schemes, "
                f"{listed(schemes)}; {REMEDY}"
            )
        if schemes:
            blocks[block.name] = schemes.pop()
    return blocks


def check_quantizable(anatomy: Anatomy, schemes: BlockSchemes, tensor_parallel: int = 1) -> None:
    """Refuse a model that cannot be quantized.


    Args:
        schemes: of the blocks.
        tensor_parallel: GPUs that will share each layer; groups must not span two of them.

    Raises:
        InputError: the model reads images, the family's projections are not Linear layers, or groups do not divide a
            projection's inputs; names the projection and the group sizes that do.
    """
    if anatomy.of_kind("experts"):
        raise InputError(
            f"quantization: {anatomy.family} has experts, which are not Linear layers; leave it unquantized"
        )
    if anatomy.image is not None:
        raise InputError(
            f"quantization: {anatomy.family} classifies images, and vLLM, which runs quantized weights, does not; "
            "leave it unquantized"
        )
    if FAMILIES[anatomy.family].transposed:
        raise InputError(
            f"quantization: the projections of {anatomy.family} are stored transposed and are not Linear layers; leave "
            "it unquantized"
        )
    if problem := ungrouped(anatomy, schemes, tensor_parallel):
        raise InputError(problem)


def ungrouped(anatomy: Anatomy, schemes: BlockSchemes, tensor_parallel: int = 1) -> str:
    """Name a projection that its scheme's groups do not divide, and the remedy; empty if they divide all of them."""
    found = [
        (one, scheme.group_size)
        for block in anatomy.blocks
        if (scheme := of_block(schemes, block.name)) is not None and scheme.group_size is not None
        for one in projections(block)
    ]
    sizes = [(one, one.inputs, tensor_parallel if one.read_units else 1) for one, _ in found]
    for (one, inputs, parts), (_, group_size) in zip(sizes, found, strict=True):
        if inputs % (group_size * parts):
            fitting = [str(size) for size in GROUP_SIZES if all(n % (size * gpus) == 0 for _, n, gpus in sizes)]
            on_each = f" on {parts} GPUs" if parts > 1 else ""
            remedy = f"choose a group size of {' or '.join(fitting)}" if fitting else "prune to sizes that they divide"
            return (
                f"group_size is {group_size}, which does not divide the {inputs} inputs of "
                f"{one.block.name} {one.paths[0]}{on_each}; {remedy}, or choose another scheme"
            )
    return ""


def _path(tensor: str) -> str:
    return tensor.removesuffix(".weight")
