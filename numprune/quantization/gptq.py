"""GPTQ: columns are rounded one after the other, and those not yet rounded make up for the error.

Frantar et al., GPTQ (ICLR 2023, arXiv 2210.17323), Algorithm 1: with U the upper Cholesky factor of H^-1 (H^-1 = U'U),
rounding column j by e_j = (w_j - q_j) / U_jj changes every later column by -e_j U_jk. It is Optimal Brain Surgeon's
update for one column after the other; with the grid {0} for the first P columns it is OBS's for removing those.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from numprune.linalg import cholesky, damped, spd_inverse
from numprune.quantization.rounding import Quantized, on_grid, per_channel, scales_of, stored
from numprune.quantization.schemes import Scheme

_BLOCK = 128  # columns whose errors are passed on to the later ones together
_DAMPING = 0.01  # relative to the mean of diag(H)


def gptq(weight: Tensor, gram: Tensor, scheme: Scheme, dtype: torch.dtype = torch.float32) -> Quantized:
    """Return a weight (out, D) on the grid, its outputs on inputs with these second moments nearly as they were.

    Columns are taken by descending diagonal of H. Scales are those of the weight as it is given, group by group in the
    stored order, so that no permutation needs to be stored.

    Args:
        weight: float64.
        gram: (D, D) float64, E[x x^T] of the inputs; centred where a bias takes the mean.
        dtype: that the scales will be stored in.
    """
    hessian = damped(gram, _DAMPING)
    scales = scales_of(weight, scheme, dtype)
    steps = per_channel(scales, weight.shape[1]).double()
    order = hessian.diagonal().argsort(descending=True, stable=True)

    def rounded(column: Tensor, index: int) -> Tensor:
        return on_grid(column / steps[:, index], scheme) * steps[:, index]

    return stored(on_grid(error_feedback(weight, hessian, order, rounded) / steps, scheme), scales, scheme)


def error_feedback(weight: Tensor, hessian: Tensor, order: Tensor, rounded: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Return the weight (out, D) with every column rounded, each after the errors of those before it.

    Args:
        weight: float64.
        hessian: (D, D) float64, positive definite.
        order: (D,) columns, first to last.
        rounded: of a column (out,) and its index gives what is to stand there.
    """
    factor = cholesky(spd_inverse(hessian[order[:, None], order])).T
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
