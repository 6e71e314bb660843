"""GPTQ: columns are rounded one after another, and the remaining ones compensate for the error.

Frantar et al., GPTQ (ICLR 2023, arXiv 2210.17323), Algorithm 1: with U the upper Cholesky factor of H^-1 (H^-1 = U'U),
rounding column j by e_j = (w_j - q_j) / U_jj changes every later column by -e_j U_jk. This is Optimal Brain Surgeon's
update column by column; with the grid {0} for the first P columns, it is OBS's update for removing them.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from numprune.linalg import cholesky, damped, spd_inverse
from numprune.quantization.rounding import Quantized, on_grid, per_channel, scales_of, stored
from numprune.quantization.schemes import Scheme

_BLOCK = 128  # columns per block, whose errors are passed on together
_DAMPING = 0.01  # relative to the mean of diag(H)


def gptq(weight: Tensor, gram: Tensor, scheme: Scheme, dtype: torch.dtype = torch.float32) -> Quantized:
    """Return a weight (out, D) on the grid that nearly preserves the outputs for inputs with these second moments.

    Columns are processed by descending diagonal of H. Scales are those of the given weight, by group in the stored
    order, so that no permutation has to be stored.

    Args:
        weight: float64.
        gram: (D, D) float64, E[x x^T] of the inputs; centred if a bias takes the mean.
        dtype: stored data type of the scales.
    """
    hessian = damped_hessian(gram)
    scales = scales_of(weight, scheme, dtype)
    steps = per_channel(scales, weight.shape[1]).double()
    order = hessian.diagonal().argsort(descending=True, stable=True)

    def rounded(column: Tensor, index: int) -> Tensor:
        return on_grid(column / steps[:, index], scheme) * steps[:, index]

    passed_on = error_feedback(weight, feedback_factor(hessian, order), order, rounded)
    return stored(on_grid(passed_on / steps, scheme), scales, scheme)


def damped_hessian(gram: Tensor) -> Tensor:
    """Return H for inputs with these second moments (D, D), positive definite."""
    return damped(gram, _DAMPING)


def feedback_factor(hessian: Tensor, order: Tensor) -> Tensor:
    """Return U of `hessian` (D, D), float64 and positive definite, with its columns in this order."""
    return cholesky(spd_inverse(hessian[order[:, None], order])).T


def error_feedback(weight: Tensor, factor: Tensor, order: Tensor, rounded: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Return the weight (out, D) with every column rounded after the errors of the preceding ones are passed on.

    Args:
        weight: float64.
        factor: returned by `feedback_factor` for this order.
        order: (D,) columns, first to last.
        rounded: maps a column (out,) and its index to its rounded value.
    """
    columns = weight.T[order].contiguous()  # (D, out): a column is contiguous
    for start in range(0, len(order), _BLOCK):
        stop = min(start + _BLOCK, len(order))
        errors = torch.empty_like(columns[start:stop])
        for place in range(start, stop):
            result = rounded(columns[place], int(order[place]))
            errors[place - start] = (columns[place] - result) / factor[place, place]
            columns[place] = result
            columns[place + 1 : stop].addr_(factor[place, place + 1 : stop], errors[place - start], alpha=-1)
        columns[stop:] -= factor[start:stop, stop:].T @ errors
    result = torch.empty_like(columns)
    result[order] = columns
    return result.T
