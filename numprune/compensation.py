"""Closed-form least squares: the kept channels take over what the removed ones did.

With C = E[y x^T] the cross moments of the outputs to reproduce and G = E[x x^T] those of the inputs the pruned block
will really see, the kept columns become

    W_K <- W_K + (C_K - W_K G_KK) (G_KK + gamma I)^-1,

ridge regression shrunk towards the original weights, by one Cholesky solve. When inputs and targets are the dense
model's own (y = W x: *oneshot*) this is Theorem 3 of Shen et al. (AAAI 2025, arXiv 2412.12441):
W_K + W_P G_PK (G_KK + gamma I)^-1. When x comes from the already pruned prefix (*sequential*) the block also allows for
what earlier blocks got wrong in its inputs. *Residual* has it make up for what they got wrong in the residual stream,
too: with h the dense and h' the pruned model's stream in front of the block, the targets are y + (h - h'), so that the
stream behind the block comes as near the dense one as the kept channels can bring it. That costs nothing more.

With inputs from the pruned prefix the targets are no longer a function of the kept channels, and what few calibration
tokens say of the difference is partly noise. So gamma is chosen for each block: the one, of five a factor of ten apart,
that fitted to three rows of four brings the fourth nearest. With little text and the least gamma, `residual` can be
worse than `oneshot`.

Where the consumer has a bias, all moments are centred and the bias takes the mean: least squares with an intercept.
"""

import torch
from torch import Tensor

from numprune.linalg import damped, spd_solve
from numprune.moments import Moments

_GAMMAS = 5


def refit(
    weight: Tensor,
    bias: Tensor | None,
    kept: Tensor,
    moments: Moments,
    damping: float,
) -> tuple[Tensor, Tensor | None]:
    """Return the kept columns (out, K) and the bias (out,) that best reproduce the block's target outputs.

    Args:
        weight: (out, D) the consumer's original weight, float64.
        bias: (out,) its bias, or None where it has none (then none is added).
        kept: (K,) indices of the kept channels.
        moments: of the inputs x, with targets y, bias included; without targets these are y = W x + b, the block's own.
        damping: gamma relative to the mean of diag(G_KK).
    """
    inputs = moments.gram[:, kept]  # E[x x_K^T]
    gram, mean = inputs[kept], moments.mean[kept]
    if moments.outputs:
        cross, target_mean = moments.cross[:, kept], moments.target_mean
    else:
        cross, target_mean = weight @ inputs, weight @ moments.mean
        if bias is not None:
            cross, target_mean = cross + bias[:, None] * mean, target_mean + bias
    del inputs  # D x K; the solve needs room
    if bias is not None:
        gram = gram - mean[:, None] * mean
        cross = cross - target_mean[:, None] * mean
    original = weight[:, kept]
    missing = (cross - original @ gram).T
    gram = damped(gram, damping)
    columns = original + spd_solve(gram, missing).T
    if bias is None:
        return columns, None
    return columns, target_mean - columns @ mean


def choose_damping(weight: Tensor, bias: Tensor | None, fitted: Moments, held: Moments, damping: float) -> float:
    """Return the gamma, of damping * 1, 10, … 10,000, whose refit to `fitted` has the least error on `held`.

    Args:
        weight: (out, K) the kept columns of the consumer's original weight, float64.
        bias: (out,) its bias, or None.
        fitted: moments of the kept channels to fit to, with targets.
        held: those of other rows.
        damping: the least gamma, relative to the mean of diag(G_KK).
    """
    every = torch.arange(weight.shape[1], device=weight.device)
    errors = {}
    for gamma in dict.fromkeys(damping * 10.0**power for power in range(_GAMMAS)):
        columns, shift = refit(weight, bias, every, fitted, gamma)
        errors[gamma] = _output_error(columns, shift, held)
    return min(errors, key=errors.__getitem__)


def _output_error(columns: Tensor, bias: Tensor | None, moments: Moments) -> float:
    """E||y - W x - b||^2 less E||y||^2."""
    error = (columns @ moments.gram * columns).sum() - 2 * (columns * moments.cross).sum()
    if bias is not None:
        error += bias @ (2 * (columns @ moments.mean - moments.target_mean) + bias)
    return float(error)


def mean_bias(weight: Tensor, bias: Tensor | None, kept: Tensor, moments: Moments) -> Tensor:
    """Return FLAP's compensation, a bias (out,): what the removed channels gave on average (arXiv 2312.11983, 3.3).

    sum over removed j of mu_j W[:, j], added to the consumer's own bias where it has one.
    """
    removed = moments.mean.clone()
    removed[kept] = 0
    contribution = weight @ removed
    return contribution if bias is None else bias + contribution
