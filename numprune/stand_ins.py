"""Replacements for the modules of a missing block, or of a block whose output is known."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from numprune.blocks import Block


def silent(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    """Replace an MLP, one of its projections, or experts: output zeros."""
    return torch.zeros_like(hidden_states)


def silent_attention(hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    """Replace attention, which also returns its weights: output zeros."""
    return torch.zeros_like(hidden_states), None


def unchanged(hidden_states: Tensor) -> Tensor:
    """Replace a norm: return its input."""
    return hidden_states


def stand_ins(block: Block) -> dict[str, Callable[..., Any]]:
    """Return replacements for the modules of a missing block, by path in the layer."""
    first, *others = block.modules
    return {
        first: silent_attention if block.kind == "attention" else silent,
        **dict.fromkeys(others, silent),
        **dict.fromkeys(block.post_norms, unchanged),
    }


def playing(block: Block, output: Tensor) -> dict[str, Callable[..., Any]]:
    """Return replacements for the modules of a block whose consumer outputs `output` (n, S, out), by path."""

    def given(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return output.view(*hidden_states.shape[:-1], -1)  # some models flatten their rows

    def given_attention(hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        return given(hidden_states), None

    first, *others = block.modules
    if block.consumer in others:  # everything before the consumer is silent
        return {**dict.fromkeys(others, silent), first: stand_ins(block)[first], block.consumer: given}
    return {first: given_attention if block.kind == "attention" else given}
