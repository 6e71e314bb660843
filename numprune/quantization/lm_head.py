"""The output matrix (`lm_head`) in 4 bits, as values that a checkpoint holds unquantized.

vLLM reads output matrices and embeddings unquantized, so the rounded values are stored in the checkpoint's own data
type. A scale has 5 significant bits: its products with -8, …, 7 have at most 8, so bfloat16 and float16 hold them
exactly, and every runtime computes with the same matrix. `on_grid` recovers integers and scales from the values, for a
runtime that stores them in 4 bits. An embedding tied to the matrix is rounded with it.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from numprune.anatomy import read_anatomy
from numprune.errors import InputError
from numprune.families import FAMILIES
from numprune.moments import Moments
from numprune.quantization.gptq import damped_hessian, error_feedback, feedback_factor
from numprune.quantization.rounding import Quantized, per_channel
from numprune.quantization.schemes import Scheme

LmHeadBits = Literal[4, 8]
_GROUP = 32
_SCHEME = Scheme("w4a16", _GROUP)
_SIGNIFICANT_BITS = 5  # of a scale
_SMALLEST = 2.0**-20  # scale: float16 holds its products
_NARROWING = torch.linspace(1, 0.65, 8)  # of the grid, which may clip the largest values of a group
_VALUES = 1 << 22  # at a time


def check_groups(hidden_size: int) -> None:
    """Refuse a hidden size that groups do not divide. Raises InputError."""
    if hidden_size % _GROUP:
        raise InputError(
            f"lm_head_bits is 4: groups of {_GROUP} do not divide the model's hidden_size {hidden_size}; use 8"
        )


def last_norm(model: PreTrainedModel) -> nn.Module:
    """Return the norm after a decoder's last layer."""
    path = FAMILIES[read_anatomy(model.config).family].final_norm
    assert path is not None
    return model.get_submodule(path)


@torch.no_grad()
def moments_of(norm: nn.Module, hidden: Tensor, device: torch.device) -> Moments:
    """Return the moments of the matrix's inputs, given the last norm and the states (N, S, H) before it.

    Raises InputError if one is not finite.
    """
    moments = Moments(hidden.shape[-1], device=device)
    for row in hidden:
        moments.add(norm(row.to(device)).to(device))
    moments.require_finite("lm_head")
    return moments


def rounding(moments: Moments | None) -> Callable[[Tensor], Tensor]:
    """Return the function that rounds rows (n, H) of the output matrix, independently of each other.

    By GPTQ, with these moments of its inputs; without moments, each value is rounded to nearest.
    """
    if moments is None:
        return _in_parts(lambda rows: _rounded(rows, per_channel(scales_of(rows), rows.shape[1])))
    device = moments.device
    hessian = damped_hessian(moments.gram)
    order = hessian.diagonal().argsort(descending=True, stable=True)
    factor = feedback_factor(hessian, order)

    def by_gptq(rows: Tensor) -> Tensor:
        steps = per_channel(scales_of(rows, hessian.diagonal()), rows.shape[1])
        return error_feedback(rows, factor, order, lambda column, index: _rounded(column, steps[:, index]))

    return _in_parts(by_gptq, device)


def scales_of(weight: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the scales (n, groups) of a weight (n, H), float64.

    Of several, the largest of which spans the group, each group has the one with the least squared error.

    Args:
        weights: (H,) of the squares; None: equal ones.
    """
    groups = weight.double().unflatten(1, (-1, _GROUP))
    weights = torch.ones(weight.shape[1]) if weights is None else weights
    weights = weights.to(groups).unflatten(0, (-1, _GROUP))
    spanning = groups.abs().amax(-1) / 7.5
    best, least = spanning, torch.full_like(spanning, torch.inf)
    for part in _NARROWING.tolist():
        scales = _short(spanning * part).clamp_min(_SMALLEST)
        error = ((groups - _rounded(groups, scales[..., None])).square() * weights).sum(-1)
        best, least = torch.where(error < least, scales, best), torch.minimum(error, least)
    return best


def on_grid(weight: Tensor) -> Quantized | None:
    """Return integers and scales whose products are exactly a stored weight (n, H); None if there are none.

    A group's scale is the greatest common divisor of its values.
    """
    columns = weight.shape[1]
    if columns % _GROUP:
        return None
    values, scales = [], []
    for part in weight.split(max(1, _VALUES // columns)):
        groups = part.float().unflatten(1, (-1, _GROUP))
        _, exponent = torch.frexp(groups.abs().amax(-1, keepdim=True))
        bits = _SIGNIFICANT_BITS + 3
        multiples = torch.ldexp(groups, bits - exponent)  # below 2^bits
        integers = multiples.round()
        if not torch.equal(multiples, integers):
            return None
        divisor = torch.from_numpy(np.gcd.reduce(integers.to(torch.int32).numpy(), axis=-1, keepdims=True)).clamp_min(1)
        integers /= divisor
        if integers.min() < -8 or integers.max() > 7:
            return None
        values.append(integers.to(torch.int8).flatten(1))
        scales.append(torch.ldexp(divisor.float(), exponent - bits).squeeze(-1))
    return Quantized(_SCHEME, torch.cat(values), torch.cat(scales))


def _in_parts(function: Callable[[Tensor], Tensor], device: torch.device | None = None) -> Callable[[Tensor], Tensor]:
    """Apply `function` to float64 parts of the rows, on `device`; return float32 where the rows are."""

    def run(rows: Tensor) -> Tensor:
        parts = rows.split(max(1, _VALUES // rows.shape[1]))
        return torch.cat([function(part.to(device, torch.float64)).to(rows.device, torch.float32) for part in parts])

    return run


def _rounded(weight: Tensor, scales: Tensor) -> Tensor:
    return (weight / scales).round().clamp(-8, 7) * scales


def _short(values: Tensor) -> Tensor:
    """Round positive values to `_SIGNIFICANT_BITS`."""
    mantissa, exponent = torch.frexp(values)
    return torch.ldexp((mantissa * 2**_SIGNIFICANT_BITS).round(), exponent - _SIGNIFICANT_BITS)
