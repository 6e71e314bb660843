"""Checks of a batch that all runtimes share, and its growing attention mask."""

from collections.abc import Sequence

import torch
from torch import Tensor


def prompt_mask(tokens: Tensor, mask: Tensor | None, vocabulary: int) -> Tensor:
    """Return the attention mask (B, S) int64 of a prompt padded on the left; all ones if `mask` is None.

    Raises ValueError on a bad mask, a mistake of the caller that would silently give wrong logits.
    """
    mask = _mask(tokens, mask, vocabulary)
    if (mask.diff(dim=1) < 0).any() or not mask[:, -1].all():
        raise ValueError("mask must be zeros (padding) on the left and ones on the right, at least one in each row")
    return mask


def encoder_mask(tokens: Tensor, mask: Tensor | None, vocabulary: int) -> Tensor:
    """Return the attention mask (B, S) int64 of right-padded texts for an encoder; otherwise like `prompt_mask`."""
    mask = _mask(tokens, mask, vocabulary)
    if (mask.diff(dim=1) > 0).any() or not mask[:, 0].all():
        raise ValueError("mask must be ones on the left and zeros (padding) on the right, at least one in each row")
    return mask


def check_images(pixels: Tensor, image: Sequence[int]) -> None:
    """Raise ValueError unless `pixels` are images (B, C, height, width) of this shape, float32."""
    if pixels.dtype != torch.float32 or not len(pixels) or tuple(pixels.shape[1:]) != tuple(image):
        raise ValueError(f"images must be a float32 tensor (B, {image}), not {pixels.dtype} {list(pixels.shape)}")


def _mask(tokens: Tensor, mask: Tensor | None, vocabulary: int) -> Tensor:
    if tokens.dtype != torch.int64 or tokens.dim() != 2 or 0 in tokens.shape:
        raise ValueError(f"tokens must be a non-empty (B, S) int64 tensor, not {tokens.dtype} {list(tokens.shape)}")
    _check_range(tokens, vocabulary)
    if mask is None:
        return torch.ones_like(tokens)
    if mask.shape != tokens.shape:
        raise ValueError(f"mask has shape {list(mask.shape)}, tokens {list(tokens.shape)}")
    mask = mask.to(torch.int64)
    if not ((mask == 0) | (mask == 1)).all():
        raise ValueError("mask must hold zeros and ones")
    return mask


def extended_mask(mask: Tensor | None, tokens: Tensor, vocabulary: int) -> Tensor:
    """Return the mask (B, T) after one more token per row. Raises ValueError, also if there was no prefill."""
    check_next(tokens, None if mask is None else len(mask), vocabulary)
    assert mask is not None
    return torch.cat([mask, torch.ones_like(tokens)], dim=1)


def check_next(tokens: Tensor, rows: int | None, vocabulary: int) -> None:
    """Raise ValueError unless there is one token for each row of the prefill; None: there was no prefill."""
    if rows is None:
        raise ValueError("call prefill() before decode()")
    if tokens.dtype != torch.int64 or tokens.shape != (rows, 1):
        raise ValueError(
            f"tokens must be a ({rows}, 1) int64 tensor, one for each row of the prefill, not {tokens.dtype} "
            f"{list(tokens.shape)}"
        )
    _check_range(tokens, vocabulary)


def _check_range(tokens: Tensor, vocabulary: int) -> None:
    if tokens.min() < 0 or tokens.max() >= vocabulary:
        raise ValueError(f"a token is outside the range 0 … {vocabulary - 1}")
