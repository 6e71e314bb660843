"""Closed-form least squares: the kept channels compensate for the removed ones.

With C = E[y x^T] the cross moments of the outputs to reproduce and G = E[x x^T] the moments of the inputs of the pruned
block, the kept columns become

    W_K <- W_K + (C_K - W_K G_KK) (G_KK + gamma I)^-1,

ridge regression shrunk towards the original weights, by one Cholesky solve. When inputs and targets are the dense
model's own (y = W x: *oneshot*) this is Theorem 3 of Shen et al. (AAAI 2025, arXiv 2412.12441):
W_K + W_P G_PK (G_KK + gamma I)^-1. If x comes from the already pruned prefix (*sequential*), the block also compensates
for errors of earlier blocks in its inputs. *Residual* additionally compensates for their errors in the residual stream:
with h the dense and h' the pruned model's stream in front of the block, the targets are y + (h - h'), so that the
stream after the block is as close to the dense one as the kept channels allow. That costs nothing extra.

With inputs from the pruned prefix, the targets are no longer a function of the kept channels, and with few calibration
tokens the difference is partly noise. Therefore gamma is chosen for each block: of five values a factor of ten apart,
the one that, fitted to three rows of four, predicts the fourth best. With little text and the smallest gamma,
`residual` can be worse than `oneshot`.

If the consumer has a bias, all moments are centred and the bias takes the mean: least squares with an intercept.
"""

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
        bias: (out,) its bias, or None (then none is added).
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
    """Return the gamma among damping * 1, 10, … 10,000 whose refit to `fitted` has the smallest error on `held`.

    They are tried from the largest down, until the error rises. float32 is enough, since trace / gamma bounds the
    condition number.

    Args:
        weight: (out, K) the kept columns of the consumer's original weight, float64.
        bias: (out,) its bias, or None.
        fitted: moments of the kept channels to fit to, with targets.
        held: those of other rows.
        damping: the smallest gamma, relative to the mean of diag(G_KK).
    """
    about = (fitted.mean, fitted.target_mean) if bias is not None else None
    gram, missing = (value.float() for value in _still_missing(weight, fitted, about))
    held_gram, held_missing = (value.float() for value in _still_missing(weight, held, about))
    gammas = dict.fromkeys(damping * 10.0**power for power in reversed(range(_GAMMAS)))
    chosen, least = damping, float("inf")
    for gamma in gammas if len(gammas) > 1 else ():
        change = spd_solve(damped(gram, gamma), missing.T).T
        error = float((change @ held_gram * change).sum() - 2 * (change * held_missing).sum())
        if error > least:
            break
        chosen, least = gamma, error
    return chosen


def _still_missing(weight: Tensor, moments: Moments, about: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Return E[x x^T] and E[(y - W x) x^T], with x and y centred on the means `about`, if given."""
    gram, cross = moments.gram, moments.cross
    if about is not None:
        mean, target_mean = about
        shift = moments.mean - mean
        gram = gram + shift[:, None] * shift - moments.mean[:, None] * moments.mean
        cross = cross + (moments.target_mean - target_mean)[:, None] * shift
        cross = cross - moments.target_mean[:, None] * moments.mean
    return gram, cross - weight @ gram


def mean_bias(weight: Tensor, bias: Tensor | None, kept: Tensor, moments: Moments) -> Tensor:
    """Return FLAP's compensation, a bias (out,): the mean output of the removed channels (arXiv 2312.11983, 3.3).

    The sum over removed j of mu_j W[:, j], added to the consumer's own bias if it has one.
    """
    removed = moments.mean.clone()
    removed[kept] = 0
    contribution = weight @ removed
    return contribution if bias is None else bias + contribution
