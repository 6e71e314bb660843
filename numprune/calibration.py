"""Runs a decoder block by block over calibration rows and hands out each block's consumer inputs.

Rows are walked layer by layer, not row by row: the hidden states of all rows stand in memory, the weights of one layer
are used at a time. The dense and the pruned model can so be carried side by side.
"""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from numprune.anatomy import Anatomy, Block
from numprune.errors import InputError

_NORMS = {"attention": "input_layernorm", "mlp": "post_attention_layernorm"}


def check_rows(model: PreTrainedModel, anatomy: Anatomy, rows: Tensor) -> None:
    """Refuse rows that the model cannot be calibrated on as its blocks are run here.

    Raises:
        InputError: a token outside the vocabulary, or rows longer than the context or than the sliding window.
    """
    length = rows.shape[1]
    limit = model.config.max_position_embeddings
    if anatomy.sliding_window is not None:
        limit = min(limit, anatomy.sliding_window)  # inside the window, plain causal attention is the same thing
    if length > limit:
        raise InputError(
            f"sequence length {length} is over the model's {limit}; give --sequence-length {limit} or less"
        )
    if int(rows.max()) >= anatomy.vocabulary:
        raise InputError(
            f"token {int(rows.max())} is outside the model's vocabulary of {anatomy.vocabulary}: "
            "the tokenizer is not this model's"
        )


class Walker:
    """Runs the blocks of one model over rows of one length, in batches.

    Args:
        model: a supported model; attention must be "sdpa", which is causal when no mask is given.
        length: S.
        batch_size: rows at a time.
    """

    def __init__(self, model: PreTrainedModel, length: int, batch_size: int = 8) -> None:
        if model.config._attn_implementation != "sdpa":
            raise ValueError(f"calibration needs attn_implementation='sdpa', not {model.config._attn_implementation!r}")
        self._model = model
        self._batch_size = batch_size
        device = model.get_input_embeddings().weight.device
        probe = torch.empty(1, length, 1, device=device, dtype=model.dtype)
        self._rope = model.model.rotary_emb(probe, torch.arange(length, device=device)[None])

    def embed(self, rows: Tensor) -> Tensor:
        """Return the hidden states (N, S, H) that enter the first layer."""
        embedding = self._model.get_input_embeddings()
        return embedding(rows.to(embedding.weight.device))

    def layer(self, block: Block) -> nn.Module:
        return self._model.model.layers[block.layer]

    def consumer(self, block: Block) -> nn.Linear:
        return cast(nn.Linear, self.layer(block).get_submodule(block.consumer))

    @torch.no_grad()
    def run(self, block: Block, hidden: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield (rows, x, y) batch by batch: consumer inputs (n, S, D), block outputs (n, S, H) before the residual."""
        layer: Any = self.layer(block)
        norm = layer.get_submodule(_NORMS[block.kind])
        captured: list[Tensor] = []

        def capture(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            captured.append(inputs[0])

        handle = self.consumer(block).register_forward_pre_hook(capture)
        try:
            for start in range(0, len(hidden), self._batch_size):
                rows = slice(start, min(start + self._batch_size, len(hidden)))
                states = norm(hidden[rows])
                captured.clear()  # another walk over the same block leaves its inputs here too
                if block.kind == "attention":
                    output = layer.self_attn(states, position_embeddings=self._rope, attention_mask=None)[0]
                else:
                    output = layer.mlp(states)
                yield rows, captured.pop(), output
        finally:
            handle.remove()

    @torch.no_grad()
    def advance(self, block: Block, hidden: Tensor) -> None:
        """Add the block's output to `hidden` (N, S, H), in place."""
        for rows, _, output in self.run(block, hidden):
            hidden[rows] += output
