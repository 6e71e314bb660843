"""The kernel distance of feature distributions (KID): squared maximum mean discrepancy, without bias.

Bińkowski et al., "Demystifying MMD GANs" (2018), with the kernel (x y / D + 1)^3 of features of length D. Unlike FID it
has no bias, of however few images. Notation: m real images, n samples, D features.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special
from torch import Tensor

from numprune.bootstrap import Estimate

_ROWS = 512  # of a matrix of kernel values, at a time


def compare_kernels(real: Tensor, baseline: Tensor, candidate: Tensor) -> tuple[Estimate, Estimate, Estimate]:
    """Return the KID of both generators, and candidate - baseline.

    The variance is that of both parts of a U-statistic's Hoeffding decomposition: of the means over one image, and of
    what they leave. Of few images the former includes some of the latter, and intervals are too wide.

    Args:
        real: (m, D) features of real images.
        baseline, candidate: (n, D) of samples; those of one row belong together.
    """
    real, sides = real.double(), [baseline.double(), candidate.double()]
    among_real = _offdiagonal([real], [1.0])
    found = []
    for weights in ([1.0, 0.0], [0.0, 1.0], [-1.0, 1.0]):
        within = _offdiagonal(sides, weights)
        across = _moments(sides, [real, real], weights)
        found.append(_estimate(within, across, _scaled(among_real, sum(weights))))
    return found[0], found[1], found[2]


@dataclass(frozen=True)
class _Kernels:
    """Sums over a matrix of kernel values: by row, by column, and of squares."""

    rows: np.ndarray
    columns: np.ndarray
    squares: float


def _moments(first: Sequence[Tensor], second: Sequence[Tensor], weights: Sequence[float]) -> _Kernels:
    """Of the weighted sum of matrices of kernels k(first, second)."""
    count, others = len(first[0]), len(second[0])
    rows, columns, squares = np.empty(count), np.zeros(others), 0.0
    for start in range(0, count, _ROWS):
        part = slice(start, start + _ROWS)
        values = sum(
            weight * _kernel(one[part], other)
            for weight, one, other in zip(weights, first, second, strict=True)
            if weight
        )
        assert isinstance(values, Tensor)
        rows[part] = values.sum(1).numpy()
        columns += values.sum(0).numpy()
        squares += float(values.square().sum())
    return _Kernels(rows, columns, squares)


def _offdiagonal(features: Sequence[Tensor], weights: Sequence[float]) -> _Kernels:
    """The same of k(x, x'), where x is not x'."""
    whole = _moments(features, features, weights)
    own = sum(w * ((x.square().sum(1) / x.shape[1] + 1) ** 3) for w, x in zip(weights, features, strict=True))
    assert isinstance(own, Tensor)
    diagonal = own.numpy()
    return _Kernels(whole.rows - diagonal, whole.columns - diagonal, whole.squares - float((diagonal**2).sum()))


def _kernel(first: Tensor, second: Tensor) -> Tensor:
    return (first @ second.T / first.shape[1] + 1) ** 3


def _scaled(kernels: _Kernels, factor: float) -> _Kernels:
    return _Kernels(kernels.rows * factor, kernels.columns * factor, kernels.squares * factor**2)


def _estimate(within: _Kernels, across: _Kernels, among_real: _Kernels) -> Estimate:
    n, m = len(within.rows), len(among_real.rows)
    of_samples = within.rows / (n - 1) - across.rows / m  # (n,) half the slope at each sample
    of_real = among_real.rows / (m - 1) - across.columns / n
    value = float(of_samples.mean() + of_real.mean())
    variance = 4 * (float(np.var(of_samples, ddof=1)) / n + float(np.var(of_real, ddof=1)) / m)
    variance += 2 * _rest(within, n, n) / n**2 + 2 * _rest(among_real, m, m) / m**2 + 4 * _rest(across, n, m) / (n * m)
    one, two = (float(special.ndtri(p)) * variance**0.5 for p in (0.95, 0.975))
    return Estimate(value, value - one, value + one, (value - two, value + two), n, "image")


def _rest(kernels: _Kernels, count: int, others: int) -> float:
    """The mean square of kernel values less their means by row and by column."""
    whole = kernels.rows.sum() / (count * others)
    of_rows, of_columns = kernels.rows / others, kernels.columns / count
    found = kernels.squares / (count * others) - np.mean(of_rows**2) - np.mean(of_columns**2) + whole**2
    return max(float(found), 0.0)
