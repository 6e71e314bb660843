"""Runs a decoder block by block over calibration rows and hands out each block's consumer inputs.

Rows are walked layer by layer, not row by row: the hidden states of all rows are kept, the weights of one layer are
used at a time. The dense and the pruned model can so be carried side by side.
"""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from numprune.anatomy import Anatomy, Block
from numprune.errors import InputError
from numprune.layers import Layers

_NORMS = {"attention": "input_layernorm", "mlp": "post_attention_layernorm"}


def longest_row(config: PreTrainedConfig, anatomy: Anatomy) -> int:
    """Return how many tokens a row may have that the model is calibrated on."""
    limit: int = config.max_position_embeddings
    # Inside the sliding window, plain causal attention is the same thing.
    return limit if anatomy.sliding_window is None else min(limit, anatomy.sliding_window)


def check_rows(config: PreTrainedConfig, anatomy: Anatomy, rows: Tensor) -> None:
    """Refuse rows that the model cannot be calibrated on as its blocks are run here.

    Raises:
        InputError: a token outside the vocabulary, or rows longer than the context or than the sliding window.
    """
    length, limit = rows.shape[1], longest_row(config, anatomy)
    if length > limit:
        raise InputError(f"sequence length {length} is over the model's {limit}; give rows of {limit} tokens or less")
    if int(rows.max()) >= anatomy.vocabulary:
        raise InputError(
            f"token {int(rows.max())} is outside the model's vocabulary of {anatomy.vocabulary}: "
            "the tokenizer is not this model's"
        )


def consumer_of(layer: nn.Module, block: Block) -> nn.Linear:
    """Return the projection of the block in its decoder layer that reads the prunable channels."""
    return cast(nn.Linear, layer.get_submodule(block.consumer))


def block_output(layer: Any, block: Block, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Return what the block adds to the residual stream `hidden` (n, S, H), of the same shape."""
    states = layer.get_submodule(_NORMS[block.kind])(hidden)
    if block.kind == "attention":
        output: Tensor = layer.self_attn(states, position_embeddings=rotary, attention_mask=None)[0]
    else:
        output = layer.mlp(states)
    return output


class Walker:
    """Runs the blocks of one model over rows of one length, in batches.

    Args:
        layers: of the model.
        length: S.
        batch_size: rows at a time.

    Attributes:
        rotary: (cos, sin) of the positions, as `block_output` takes them.
    """

    def __init__(self, layers: Layers, length: int, batch_size: int = 8) -> None:
        self._layers = layers
        self._batch_size = batch_size
        self.rotary = layers.rotary(length)

    @torch.no_grad()
    def embed(self, rows: Tensor) -> Tensor:
        """Return the hidden states (N, S, H) that enter the first layer."""
        hidden = self._layers.allocate(*rows.shape, self._layers.anatomy.hidden_size)
        for batch in self.batches(len(rows)):
            hidden[batch] = self._layers.embed(rows[batch]).to(hidden.device)
        return hidden

    def copy(self, hidden: Tensor) -> Tensor:
        """Return a copy of hidden states, kept where they are."""
        return self._layers.allocate(*hidden.shape).copy_(hidden)

    @torch.no_grad()
    def run(self, layer: nn.Module, block: Block, hidden: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield (rows, x, y) batch by batch: consumer inputs (n, S, D), block outputs (n, S, H) before the residual.

        Args:
            layer: the block's decoder layer.
            block: which of its blocks.
            hidden: (N, S, H), what enters the block; `x` and `y` are on the layer's device.
        """
        captured: list[Tensor] = []

        def capture(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            captured.append(inputs[0])

        handle = consumer_of(layer, block).register_forward_pre_hook(capture)
        try:
            for batch in self.batches(len(hidden)):
                captured.clear()  # another walk over the same block leaves its inputs here too
                output = block_output(layer, block, hidden[batch].to(self._layers.device), self.rotary)
                yield batch, captured.pop(), output
        finally:
            handle.remove()

    @torch.no_grad()
    def advance(self, layer: nn.Module, block: Block, hidden: Tensor) -> None:
        """Add the block's output to `hidden` (N, S, H), in place."""
        for batch, _, output in self.run(layer, block, hidden):
            hidden[batch] += output.to(hidden.device)

    def batches(self, rows: int) -> Iterator[slice]:
        """Yield the slices that `rows` rows are worked through in."""
        for start in range(0, rows, self._batch_size):
            yield slice(start, min(start + self._batch_size, rows))
