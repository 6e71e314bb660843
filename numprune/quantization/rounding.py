"""Rounding to a scheme's grid: weights with a scale for each row or group, inputs with a scale for each token.

Scales span the largest magnitude: s = max|w| / 448 for FP8, max|w| / 127.5 for 8-bit and max|w| / 7.5 for 4-bit
integers, whose grids have one number more below zero than above; the largest positive value may be cut by half a step.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from numprune.quantization.schemes import Scheme

_FP8 = torch.float8_e4m3fn
_FP8_LARGEST = torch.finfo(_FP8).max  # 448
_FLOAT16_SMALLEST = 2.0**-24  # subnormal: scales of ordinary weights are below the least normal number, 2^-14


@dataclass(frozen=True)
class Quantized:
    """A matrix on a grid.

    Attributes:
        scheme: of the grid.
        values: (out, D), int8 or float8_e4m3fn.
        scales: (out, groups) float32; one group is the whole row.
    """

    scheme: Scheme
    values: Tensor
    scales: Tensor

    def dequantized(self) -> Tensor:
        """Return the matrix (out, D) in float32. No product is rounded but those of 8-bit values with full scales."""
        scales = self.scales[..., None]
        return (self.values.float().unflatten(-1, (scales.shape[1], -1)) * scales).flatten(-2)


def scales_of(weight: Tensor, scheme: Scheme, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the scales (out, groups), float32, that span a weight (out, D).

    Args:
        dtype: that they will be stored in: their values are of it, so that nobody computes with others.
    """
    size = scheme.group_size or weight.shape[1]
    largest = weight.unflatten(1, (-1, size)).abs().amax(-1).float()
    smallest = _FLOAT16_SMALLEST if dtype == torch.float16 else torch.finfo(torch.float32).tiny
    scales = (largest / _half_span(scheme)).to(dtype).float().clamp_min(smallest)
    return torch.where(largest > 0, scales, 1.0)


def on_grid(scaled: Tensor, scheme: Scheme) -> Tensor:
    """Return the nearest values of the grid, in the data type of `scaled`, a tensor already divided by its scales."""
    if scheme.is_float:
        return scaled.clamp(-_FP8_LARGEST, _FP8_LARGEST).to(_FP8).to(scaled.dtype)
    limit = 2 ** (scheme.bits - 1)
    return scaled.round().clamp(-limit, limit - 1)


def stored(grid: Tensor, scales: Tensor, scheme: Scheme) -> Quantized:
    """Return values of the grid (out, D) as they are stored."""
    return Quantized(scheme, grid.to(_FP8 if scheme.is_float else torch.int8), scales)


def round_to_nearest(weight: Tensor, scheme: Scheme, dtype: torch.dtype = torch.float32) -> Quantized:
    """Return a weight (out, D), each value rounded by itself; `dtype` as of `scales_of`."""
    scales = scales_of(weight, scheme, dtype)
    return stored(on_grid(weight.double() / per_channel(scales, weight.shape[1]), scheme), scales, scheme)


def per_channel(scales: Tensor, channels: int) -> Tensor:
    """Return scales (out, groups) as one for each channel, (out, D)."""
    return scales.repeat_interleave(channels // scales.shape[1], dim=1)


def round_tokens(inputs: Tensor, scheme: Scheme) -> Tensor:
    """Return inputs (…, D), each token rounded to the grid with a scale of its own: what a kernel computes with.

    vLLM's kernels span a token with 127 steps of an 8-bit integer, not 127.5 as weights are.
    """
    limit = _FP8_LARGEST if scheme.is_float else 127.0
    scales = inputs.abs().amax(-1, keepdim=True).float() / limit
    scales = torch.where(scales > 0, scales, 1.0)
    return (on_grid(inputs.float() / scales, scheme) * scales).to(inputs.dtype)


def round_inputs_of(linear: nn.Module, scheme: Scheme) -> None:
    """Have a Linear layer round its inputs from now on, where the scheme does."""
    if scheme.rounds_inputs:
        linear.register_forward_pre_hook(lambda _, args: (round_tokens(args[0], scheme), *args[1:]))


def _half_span(scheme: Scheme) -> float:
    return _FP8_LARGEST if scheme.is_float else (2**scheme.bits - 1) / 2
