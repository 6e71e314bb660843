"""What stands where a layer goes without a block."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from numprune.blocks import Block


def silent(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    """Stand for an MLP, one of its projections, or experts that put out zeros."""
    return torch.zeros_like(hidden_states)


def silent_attention(hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    """Stand for attention, which gives its weights back, too."""
    return torch.zeros_like(hidden_states), None


def unchanged(hidden_states: Tensor) -> Tensor:
    """Stand for a norm that does nothing."""
    return hidden_states


def stand_ins(block: Block) -> dict[str, Callable[..., Any]]:
    """Return what stands for the modules of a block that is left out, by their paths in the layer."""
    first, *others = block.modules
    return {
        first: silent_attention if block.kind == "attention" else silent,
        **dict.fromkeys(others, silent),
        **dict.fromkeys(block.post_norms, unchanged),
    }
