"""A decoder as its layers, one at a time: what pruning and everything else that walks a model needs of it.

`ModelLayers` is a model in memory; export/streaming.py reads the same from a checkpoint's shards. Whoever walks cannot
tell which it is, except by what stays in memory.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from numprune.anatomy import Anatomy, read_anatomy


@dataclass(frozen=True)
class Head:
    """What makes logits of the last layer's output: logits = output(norm(hidden))."""

    norm: nn.Module
    output: nn.Module  # (…, H) -> (…, vocabulary)


class Layers(Protocol):
    """A decoder whose layers can be had in any order. Attention is "sdpa": causal when no mask is given.

    Attributes:
        device: where the modules are, and their inputs must be.
        dtype: that everything is computed in.
        resident: all layers are in memory, so that to come back to one costs nothing.
    """

    config: PreTrainedConfig
    anatomy: Anatomy
    device: torch.device
    dtype: torch.dtype
    resident: bool

    def embed(self, rows: Tensor) -> Tensor:
        """Return the hidden states (n, S, H) of token rows (n, S) that enter the first layer, on `device`."""

    def layer(self, index: int) -> AbstractContextManager[nn.Module]:
        """Give the decoder layer for the duration of a `with` block, its parameters leaves that can have gradients.

        What is written into it lasts as long as the model does in memory, and no longer than the block where it is
        read from a checkpoint.
        """

    def head(self) -> AbstractContextManager[Head]:
        """Give the last norm and the output matrix for the duration of a `with` block."""

    def rotary(self, length: int) -> tuple[Tensor, Tensor]:
        """Return the rotary embeddings (cos, sin) of positions 0 … length - 1, each (1, length, head_dim)."""

    def allocate(self, *shape: int) -> Tensor:
        """Return room for the hidden states of all rows, in `dtype`, its values undefined: on `device`, or in a file.

        Whoever reads a batch of it moves the batch to `device`.
        """


class ModelLayers:
    """The layers of a model in memory: `layer` and `head` give the model's own modules.

    Raises ValueError when its attention is not "sdpa".
    """

    resident = True

    def __init__(self, model: PreTrainedModel) -> None:
        if model.config._attn_implementation != "sdpa":
            raise ValueError(f"layers need attn_implementation='sdpa', not {model.config._attn_implementation!r}")
        self._model: Any = model
        self.config: PreTrainedConfig = model.config
        self.anatomy = read_anatomy(model.config)
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype

    def embed(self, rows: Tensor) -> Tensor:
        embedded: Tensor = self._model.get_input_embeddings()(rows.to(self.device))
        return embedded

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        yield self._model.model.layers[index]

    @contextmanager
    def head(self) -> Iterator[Head]:
        yield Head(self._model.model.norm, self._model.get_output_embeddings())

    def rotary(self, length: int) -> tuple[Tensor, Tensor]:
        return rotary_of(self._model.model.rotary_emb, length, self.dtype)

    def allocate(self, *shape: int) -> Tensor:
        return torch.empty(*shape, dtype=self.dtype, device=self.device)


def rotary_of(module: nn.Module, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return (cos, sin), each (1, length, head_dim) in `dtype`, of a decoder's rotary embedding."""
    device = next(module.buffers()).device
    probe = torch.empty(1, length, 1, device=device, dtype=dtype)
    cos, sin = module(probe, torch.arange(length, device=device)[None])
    return cos, sin
