"""Masks on the coordinates of the residual stream: one for each, shared by embeddings and every block's output.

A mask multiplies what embeddings and blocks add to its coordinate, and so all that any layer reads there.

Notation: H hidden size; n rows, S tokens of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from numprune.anatomy import family_of, model_prefix
from numprune.blocks import Anatomy, Block
from numprune.calibration import consumer_of
from numprune.hidden import outputs_of


@dataclass(frozen=True)
class Stream:
    """The residual stream.

    Attributes:
        size: H.
        cost: of a coordinate in all blocks together.
        blocks: that write to it.
    """

    size: int
    cost: float
    blocks: tuple[Block, ...]


def hook_stream(layers: Sequence[nn.Module], stream: Stream, values: Tensor) -> list[RemovableHandle]:
    """Multiply the coordinates by (n, H), or (1, H) for all rows, until the hooks are removed."""

    def enter(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (scaled(args[0]), *args[1:])

    def write(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return scaled(output)

    def scaled(hidden: Tensor) -> Tensor:
        by_row = hidden.reshape(len(values), -1, hidden.shape[-1])  # some models flatten rows
        return (by_row * values[:, None].to(by_row)).view_as(hidden)

    consumers = [consumer_of(layers[block.layer], block) for block in stream.blocks]
    return [
        layers[0].register_forward_pre_hook(enter),
        *(consumer.register_forward_hook(write) for consumer in consumers),
    ]


@torch.no_grad()
def fold_stream(model: PreTrainedModel, anatomy: Anatomy, values: Tensor) -> None:
    """Fold (H,) into the weights: the model then computes the same without masks.

    Embeddings and what blocks write are multiplied. A tied head has the embeddings' weights, so the last norm's gain is
    divided for it.
    """
    family, config = family_of(model.config), model.config
    for block in anatomy.blocks:
        if block.units:
            for parameter, dim in outputs_of(model.get_submodule(block.path), block):
                parameter.mul_(values.view(-1, *[1] * (parameter.dim() - 1 - dim)))
    prefix = model_prefix(config)
    model.get_parameter(f"{prefix}{family.embedding}.weight").mul_(values)
    if config.tie_word_embeddings:
        # Where the embedding is now zero, any gain gives the same.
        model.get_parameter(f"{prefix}{family.final_norm}.weight").div_(values.where(values != 0, 1))
