"""Attention in windows: where an image's tokens are in them.

Notation: n images, S tokens, W windows of A positions, P = W A positions in all windows of an image, which may include
padding.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.swin.modeling_swin import window_partition

from numprune.blocks import Block


class Windows(NamedTuple):
    """The windows of a layer.

    Attributes:
        tokens: (P,) the token at each position, in the order of rows and columns; -1: padding.
        positions: (S,) the position of each token.
    """

    tokens: Tensor
    positions: Tensor

    def by_token(self, values: Tensor) -> Tensor:
        """Return values at all positions, (n W, A, D), by token: (n, S, D)."""
        return values.reshape(-1, len(self.tokens), values.shape[-1])[:, self.positions]

    def by_position(self, values: Tensor) -> Tensor:
        """Return values of tokens, (n, S, D), at all positions: (n, P, D), zero in the padding."""
        return functional.pad(values, (0, 0, 0, 1))[:, self.tokens]  # -1 is the row appended here

    def attention(self, weights: Tensor) -> Tensor:
        """Return the attention of each token on each, (1, heads, S, S), from that inside windows, (W, heads, A, A)."""
        windows, heads, area, _ = weights.shape
        tokens = self.tokens.view(windows, area)
        full = weights.new_zeros(heads, len(self.positions) + 1, len(self.positions) + 1)  # the last: padding, -1
        full[:, tokens[:, :, None], tokens[:, None]] = weights.transpose(0, 1)
        return full[None, :, :-1, :-1]


def windows_of(layer: nn.Module, block: Block) -> Windows:
    """Return the windows of a layer of Swin, shifted as the layer shifts them; `block`: its attention."""
    assert block.stage is not None
    height, width = block.stage.grid
    swin: Any = layer
    swin.set_shift_and_window_size((height, width))
    numbers = torch.arange(height * width, device=next(layer.parameters()).device) + 1  # 0: padding
    padded, _ = swin.maybe_pad(numbers.view(1, height, width, 1), height, width)
    tokens = window_partition(swin.cyclic_shift(padded), swin.window_size).flatten() - 1
    return Windows(tokens, tokens.argsort()[len(tokens) - len(numbers) :])
