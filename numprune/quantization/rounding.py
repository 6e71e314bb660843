"""Rounding to a scheme's grid: weights with a scale for each row or group, inputs with a scale for each token.

Scales are set by the largest magnitude: s = max|w| / 448 for FP8, max|w| / 127.5 for 8-bit and max|w| / 7.5 for 4-bit
integers, whose grids have one more negative than positive value; the largest positive value may be clipped by half a
step.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from numprune.quantization.schemes import Scheme

_FP8 = torch.float8_e4m3fn
_FP8_LARGEST = torch.finfo(_FP8).max  # 448
_FLOAT16_SMALLEST = 2.0**-24  # subnormal: scales of ordinary weights are below the smallest normal number, 2^-14


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
        """Return the matrix (out, D) in float32. Only products of 8-bit values with float32 scales are rounded."""
        scales = self.scales[..., None]
        return (self.values.float().unflatten(-1, (scales.shape[1], -1)) * scales).flatten(-2)


def scales_of(weight: Tensor, scheme: Scheme, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the scales (out, groups), float32, that span a weight (out, D).

    Args:
        dtype: their stored data type, to which they are rounded, so that all readers compute with the same scales.
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
    """Return values of the grid (out, D) as stored."""
    return Quantized(scheme, grid.to(_FP8 if scheme.is_float else torch.int8), scales)


def round_to_nearest(weight: Tensor, scheme: Scheme, dtype: torch.dtype = torch.float32) -> Quantized:
    """Return a weight (out, D) with each value rounded to nearest; `dtype` as for `scales_of`."""
    scales = scales_of(weight, scheme, dtype)
    return stored(on_grid(weight.double() / per_channel(scales, weight.shape[1]), scheme), scales, scheme)


def per_channel(scales: Tensor, channels: int) -> Tensor:
    """Return scales (out, groups) as one for each channel, (out, D)."""
    return scales.repeat_interleave(channels // scales.shape[1], dim=1)


def round_tokens(inputs: Tensor, scheme: Scheme) -> Tensor:
    """Return inputs (…, D) with each token rounded to the grid with its own scale, as in a kernel.

    vLLM's kernels scale a token to 127 steps of an 8-bit integer, whereas weights use 127.5.
    """
    limit = _FP8_LARGEST if scheme.is_float else 127.0
    scales = inputs.abs().amax(-1, keepdim=True).float() / limit
    scales = torch.where(scales > 0, scales, 1.0)
    return (on_grid(inputs.float() / scales, scheme) * scales).to(inputs.dtype)


def round_inputs_of(linear: nn.Module, scheme: Scheme) -> None:
    """Make a Linear layer round its inputs, if the scheme does so."""
    if scheme.rounds_inputs:
        linear.register_forward_pre_hook(lambda _, args: (round_tokens(args[0], scheme), *args[1:]))


def _half_span(scheme: Scheme) -> float:
    return _FP8_LARGEST if scheme.is_float else (2**scheme.bits - 1) / 2
