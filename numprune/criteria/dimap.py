"""DIMAP's importance of weights, summed over units (He and Zhou, ICLR 2024, arXiv 2404.13648)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from numprune.blocks import Block
from numprune.criteria.view import BlockView
from numprune.members import by_member


def dimap(view: BlockView) -> Tensor:
    """Return the summed importance of each unit's weights, (units,).

    The paper masks single weights and trains afterwards; here the importances of all weights that go with a head or a
    channel are added. They depend on nothing but weights.
    """
    if view.dimap is None:
        raise ValueError("the view has no importances: give those of `importances`")
    return view.dimap.sum(1)


@torch.no_grad()
def importances(layer: nn.Module, block: Block) -> Tensor:
    """Return the summed importance of the weights of each unit's members, (units, members) float64.

    Biases do not count.
    """
    found: dict[str, Tensor] = {}
    for names in matrices_of(block):
        found |= dict(zip(names, weight_importances([layer.get_parameter(name) for name in names]), strict=True))

    def importance(name: str) -> Tensor:
        return found[name] if name in found else torch.zeros_like(layer.get_parameter(name), dtype=torch.float64)

    return by_member(block, importance, found[block.reader.tensor].device)


def matrices_of(block: Block) -> list[list[str]]:
    """Return the parameters of each of the block's layers in the paper's sense, by names in the decoder layer.

    Queries, keys and values are one layer (ATT-QKV), the projection after them another (ATT-PRJ). Each matrix of an MLP
    is a layer (MLP-FC1, MLP-FC2).
    """
    writers = [part.tensor for part in block.writers if part.hidden_dim is not None]
    of_writers = [writers] if block.kind == "attention" else [[name] for name in writers]
    return [*of_writers, [block.reader.tensor]]


def weight_importances(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Return the importance of each weight of a layer, float64: w^2 / sum of v^2 over its v with |v| >= |w| (eq. 10).

    Args:
        matrices: that form the layer.
    """
    squares = torch.cat([matrix.flatten() for matrix in matrices]).double().square()
    ascending = squares.sort().values
    from_here = ascending.flip(0).cumsum(0).flip(0)
    larger = from_here[torch.searchsorted(ascending, squares)]  # from the first of equal ones: all of them count
    shares = squares / larger.clamp_min(torch.finfo(torch.float64).tiny)
    parts = shares.split([matrix.numel() for matrix in matrices])
    return [part.view_as(matrix) for part, matrix in zip(parts, matrices, strict=True)]
