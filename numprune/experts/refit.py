"""Least squares for all experts of a layer together: the remaining experts compensate for the removed ones.

The layer's output is linear in its experts' down projections (see __init__.py), which gives one least-squares problem:
bring sum_e W_e x_e as close to the targets as possible, by ridge regression towards the original weights. The Gram
matrix G_e of one expert is small. Those of all pairs of experts are not, and they matter: each of a token's k experts
can compensate for the error of another. The normal equations are therefore never formed, only multiplied with, token by
token, and solved by a few steps of conjugate gradients preconditioned with (G_e + gamma_e I)^-1. If no token had two
experts, one step would be exact.

gamma_e is relative to the mean of diag(G_e). As in compensation.py, if rows are held out, it is the one of five values
a factor of ten apart whose fit to the other rows is best on them. The search ends at the first value that is no better
than the preceding one.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from numprune.experts.inputs import Share
from numprune.linalg import cholesky, damped
from numprune.processes import ALONE, Processes

STEPS = 6
_GAMMAS = 5


@dataclass(frozen=True)
class Batch:
    """Tokens to fit to.

    Attributes:
        shares: of the experts.
        target: (T, H), the desired output of the layer's experts.
        held_out: (T,) bool, tokens for choosing gamma.
    """

    shares: Sequence[Share]
    target: Tensor
    held_out: Tensor


@dataclass(frozen=True)
class Fitted:
    """Weights (E, H, D), and the gamma of their fit."""

    weights: Tensor
    damping: float


Batches = Callable[[], Iterator[Batch]]


def refit_experts(
    weights: Tensor, batches: Batches, damping: float, *, choose: bool = False, processes: Processes = ALONE
) -> Fitted:
    """Return the down projections, biases as their last column, that best reproduce the targets.

    Memory holds at most eight tensors of the size of `weights`, and three float64 Gram matrices of every expert.

    Args:
        weights: (E, H, D), to start from and to shrink towards.
        batches: yields all tokens, the same each time.
        damping: gamma; the smallest one to try if it is chosen.
        choose: choose gamma by the held-out tokens.
        processes: that share the tokens.
    """
    fitted, held = (_Sums.of(weights, batches, held_out, processes) for held_out in (False, True))
    gamma, least = damping, float("inf")
    for candidate in (damping * 10.0**power for power in range(_GAMMAS)) if choose else ():
        change = _conjugate_gradients(fitted, candidate, lambda: _fitted_only(batches), processes)
        error = _held_out_error(change, held, batches, processes)
        if error >= least:
            break
        gamma, least = candidate, error
    return Fitted(weights + _conjugate_gradients(fitted.with_others(held), gamma, batches, processes), gamma)


@dataclass(frozen=True)
class _Sums:
    """Sums over tokens, of every expert.

    Attributes:
        gram: (E, D, D) float64, x x^T.
        missing: (E, H, D), (t - sum W x) x^T.
    """

    gram: Tensor
    missing: Tensor

    @classmethod
    def of(cls, weights: Tensor, batches: Batches, held_out: bool, processes: Processes) -> "_Sums":
        """Return the sums of the held-out tokens, or of the others."""
        experts, _, inputs = weights.shape
        gram = weights.new_zeros(experts, inputs, inputs, dtype=torch.float64)
        missing = torch.zeros_like(weights)
        for batch in batches():
            residual = batch.target - _output(weights, batch)
            for share in _some(batch, batch.held_out == held_out).shares:
                gram[share.expert] += share.inputs.T @ share.inputs
                missing[share.expert] += residual[share.tokens].T @ share.inputs
        processes.add_up(gram, missing)
        return cls(gram, missing)

    def with_others(self, others: "_Sums") -> "_Sums":
        """Return the sums of these tokens and of others."""
        return _Sums(self.gram.add_(others.gram), self.missing.add_(others.missing))


class _Preconditioner:
    """(x x^T + gamma_e I)^-1 of every expert."""

    def __init__(self, grams: Tensor, damping: float) -> None:
        ridged = damped(grams, damping)
        self.ridge = (ridged - grams).diagonal(dim1=1, dim2=2)[:, :1, None]  # (E, 1, 1), gamma_e
        self._factors = cholesky(ridged)

    def solve(self, gradient: Tensor) -> Tensor:
        return torch.cholesky_solve(gradient.mT.double(), self._factors).mT.to(gradient)


def _conjugate_gradients(sums: _Sums, damping: float, batches: Batches, processes: Processes) -> Tensor:
    """Return the change of the weights (E, H, D) after a few steps."""
    preconditioner, residual = _Preconditioner(sums.gram, damping), sums.missing.clone()
    change = torch.zeros_like(residual)
    direction = preconditioned = preconditioner.solve(residual)
    fit = _dot(residual, preconditioned)
    for _ in range(STEPS):
        if not fit > 0:  # nothing left to gain
            break
        product = torch.zeros_like(direction)
        for batch in batches():
            output = _output(direction, batch)
            for share in batch.shares:
                product[share.expert] += output[share.tokens].T @ share.inputs
        processes.add_up(product)
        product += preconditioner.ridge.to(direction) * direction
        curving = _dot(direction, product)
        if not curving > 0:  # no more than rounding
            break
        length = fit / curving
        change += length * direction
        residual -= length * product
        preconditioned = preconditioner.solve(residual)
        before, fit = fit, _dot(residual, preconditioned)
        direction = preconditioned + fit / before * direction
    return change


def _held_out_error(change: Tensor, held_out: _Sums, batches: Batches, processes: Processes) -> float:
    """Return by how much a change of the weights changes the squared error of the held-out tokens."""
    squares = held_out.gram.new_zeros(())
    for batch in batches():
        squares += _output(change, batch)[batch.held_out].double().square().sum()
    processes.add_up(squares)
    return float(squares) - 2 * _dot(change, held_out.missing)


def _output(weights: Tensor, batch: Batch) -> Tensor:
    """Return sum_e W_e x_e of each token, (T, H)."""
    output = torch.zeros_like(batch.target)
    for share in batch.shares:
        output.index_add_(0, share.tokens, share.inputs @ weights[share.expert].T)
    return output


def _fitted_only(batches: Batches) -> Iterator[Batch]:
    for batch in batches():
        yield _some(batch, ~batch.held_out)


def _some(batch: Batch, tokens: Tensor) -> Batch:
    """Return a batch in which only `tokens`, (T,) bool, are routed to experts."""
    shares = []
    for share in batch.shares:
        stay = tokens[share.tokens]
        shares.append(Share(share.expert, share.tokens[stay], share.inputs[stay]))
    return Batch(shares, batch.target, batch.held_out)


def _dot(one: Tensor, other: Tensor) -> float:
    return float(torch.dot(one.flatten().double(), other.flatten().double()))
