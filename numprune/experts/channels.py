"""Experts whose channels are multiplied by masks."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from numprune.blocks import Block
from numprune.experts.inputs import outputs_first


def has_biases(block: Block) -> bool:
    """Return whether experts have a bias, which no channel's mask reaches."""
    return any(part.tensor == f"{block.reader.tensor}_bias" for part in block.writers)


def channels_masked(layer: nn.Module, block: Block, values: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return the forward pass of a layer's experts with the inputs of their down projections multiplied.

    It is differentiable in the weights and in `values`; experts must not have biases.

    Args:
        values: (n, E * I), for the rows of the batch, or (1, E * I) for all.
    """
    module: Any = layer.get_submodule(block.consumer)
    reader, writer = block.reader, block.writers[0]

    def forward(hidden: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """Args: hidden (n * S, H), experts (n * S, k), weights (n * S, k)."""
        up = outputs_first(layer.get_parameter(writer.tensor), writer.dim == 1)
        down = outputs_first(layer.get_parameter(reader.tensor), reader.dim == 2)
        masks = values.view(len(values), block.units, block.members)
        output = torch.zeros_like(hidden)
        for expert in experts.unique().tolist():
            tokens, place = (experts == expert).nonzero(as_tuple=True)
            rows = tokens // (len(hidden) // len(values))
            inner = module._apply_gate(nn.functional.linear(hidden[tokens], up[expert]))
            weighted = weights[tokens, place, None] * masks[rows, expert] * inner
            output = output.index_add(0, tokens, nn.functional.linear(weighted.to(hidden), down[expert]))
        return output

    return forward
