"""DIMAP's importance of weights, summed over units (He and Zhou, ICLR 2024, arXiv 2404.13648)."""

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

    A weight's importance is w^2 / sum of v^2 over the weights v of its module with |v| >= |w|. Modules are
    those of the paper: queries, keys and values (QKV-M), the projection after them (PRJ-M), and an MLP as a whole
    (MLP-M); biases do not count.
    """
    writers = [part.tensor for part in block.writers if part.hidden_dim is not None]
    reader = [block.reader.tensor]
    modules = [writers, reader] if block.kind == "attention" else [[*writers, *reader]]
    found: dict[str, Tensor] = {}
    for names in modules:
        matrices = [layer.get_parameter(name).double() for name in names]
        squares = torch.cat([matrix.flatten() for matrix in matrices]).square()
        order = squares.argsort(descending=True)
        larger = torch.empty_like(squares)
        larger[order] = squares[order].cumsum(0)
        shares = squares / larger.clamp_min(torch.finfo(torch.float64).tiny)
        parts = shares.split([matrix.numel() for matrix in matrices])
        found |= {name: part.view_as(matrix) for name, part, matrix in zip(names, parts, matrices, strict=True)}

    def importance(name: str) -> Tensor:
        return found[name] if name in found else torch.zeros_like(layer.get_parameter(name), dtype=torch.float64)

    return by_member(block, importance, found[block.reader.tensor].device)
