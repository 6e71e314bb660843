"""The Fréchet distance of feature distributions (FID), with its bias removed and an interval.

FID is the squared distance of two Gaussians with the means and covariances of the features (Heusel et al., "GANs
Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium", 2017). Of finitely many images it is too
large, by about a constant over their number, and differently so for each generator. Chong and Forsyth ("Effectively
Unbiased FID and Inception Score and Where to Find Them", 2020) extrapolate it to infinitely many samples along that
line. This module does so with all images and with halves of them, of samples and of real images alike.

Notation: m real images, n samples, D features.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import special
from torch import Tensor

from numprune.bootstrap import Estimate

SAMPLES_PER_FEATURE = 4  # at least, for images and samples; the interval's error rates are measured from here on
_SPLITS = 6  # into random halves
_RANK = 1e-12  # of the largest eigenvalue; smaller ones are rounding errors


@dataclass(frozen=True)
class FrechetDistance:
    """FID of the samples of a generator to real images.

    Attributes:
        published: of these images, as the literature reports it, with its bias.
        extrapolated: to infinitely many images, with its uncertainty.
    """

    published: float
    extrapolated: Estimate


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Return the FID of features (m, D) and (n, D)."""
    return _Reference(first).distance(*_moments(second))


def compare_frechet(
    real: Tensor, baseline: Tensor, candidate: Tensor, seed: int = 0
) -> tuple[FrechetDistance, FrechetDistance, Estimate]:
    """Return the FID of both generators, and candidate - baseline.

    The variance is the sum of two parts: of the distance's derivative at each image, and of its quadratic part. The
    mean distance of both halves has the same linear part as that of all images, so over random halves it varies as much
    as the quadratic part does. The sum counts some of the latter twice: with few images, or equal distributions,
    intervals are too wide. Degrees of freedom are Satterthwaite's. A bootstrap would need an eigendecomposition for
    each draw, and would double the bias.

    Args:
        real: (m, D) features of real images, at least `SAMPLES_PER_FEATURE` for each feature, like the samples.
        baseline, candidate: (n, D) of samples; those of one row belong together.
        seed: of the halves.
    """
    whole = _Reference(real)
    sides = [baseline, candidate]
    published = np.array([whole.distance(*_moments(side)) for side in sides])
    halved = np.array([_halved(real, sides, seed, split) for split in range(_SPLITS)])  # (splits, 2)
    slopes = [whole.slopes(real, side) for side in sides]  # of samples and of real images, (n,) and (m,)
    estimates = []
    for first, second in ([1.0, 0.0], [0.0, 1.0], [-1.0, 1.0]):
        weights = np.array([first, second])
        parts = [first * one + second * other for one, other in zip(*slopes, strict=True)]
        estimates.append(_estimate(float(published @ weights), halved @ weights, parts, len(baseline)))
    return (
        FrechetDistance(float(published[0]), estimates[0]),
        FrechetDistance(float(published[1]), estimates[1]),
        estimates[2],
    )


def _halved(real: Tensor, sides: Sequence[Tensor], seed: int, split: int) -> list[float]:
    """Each side's distance, mean over two random halves of real images and samples."""
    generator = torch.Generator().manual_seed((seed << 16) + split)
    orders = [torch.randperm(count, generator=generator).chunk(2) for count in (len(real), len(sides[0]))]
    found = []
    for of_real, of_samples in zip(*orders, strict=True):
        reference = _Reference(real[of_real])
        found.append([reference.distance(*_moments(side[of_samples])) for side in sides])
    return [sum(distances) / 2 for distances in zip(*found, strict=True)]


def _estimate(value: float, halved: np.ndarray, slopes: Sequence[np.ndarray], samples: int) -> Estimate:
    linear = [float(np.var(slope, ddof=1)) / len(slope) for slope in slopes]
    rest = float(np.var(halved, ddof=1)) * (1 + 1 / len(halved))
    variances, freedoms = [*linear, rest], [*(len(slope) - 1 for slope in slopes), len(halved) - 1]
    total = sum(variances)
    squares = sum(variance**2 / freedom for variance, freedom in zip(variances, freedoms, strict=True))
    freedom = total**2 / squares if squares else 1.0
    corrected = 2 * value - float(np.mean(halved))
    one, two = (float(special.stdtrit(freedom, p)) * total**0.5 for p in (0.95, 0.975))
    return Estimate(corrected, corrected - one, corrected + one, (corrected - two, corrected + two), samples, "image")


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean (D,) and unbiased covariance (D, D), float64."""
    values = features.double()
    mean = values.mean(0)
    centred = values - mean
    return mean, centred.T @ centred / (len(values) - 1)


class _Reference:
    """Real images, to which distances are measured."""

    def __init__(self, features: Tensor) -> None:
        self.mean, self.covariance = _moments(features)
        values, self._vectors = torch.linalg.eigh(self.covariance)
        self._scales = values.clamp(min=0).sqrt()
        self._root = self._power(self._scales)

    def _power(self, scales: Tensor) -> Tensor:
        return (self._vectors * scales) @ self._vectors.T

    def distance(self, mean: Tensor, covariance: Tensor) -> float:
        """|m - m'|^2 + tr(S + S' - 2 (S^1/2 S' S^1/2)^1/2); the last trace is a sum of roots of eigenvalues."""
        between = torch.linalg.eigvalsh(self._root @ covariance @ self._root).clamp(min=0).sqrt().sum()
        traces = self.covariance.trace() + covariance.trace() - 2 * between
        return float((self.mean - mean).square().sum() + traces)

    def slopes(self, real: Tensor, samples: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """The derivative of the distance towards each sample (n,) and each real image (m,).

        The derivative by S' is I - T, where T = S^1/2 (S^1/2 S' S^1/2)^-1/2 S^1/2 maps one Gaussian to the other, and
        that by S is I - T^-1.
        """
        mean, covariance = _moments(samples)
        values, vectors = torch.linalg.eigh(self._root @ covariance @ self._root)
        scales = values.clamp(min=0).sqrt()
        forth = self._root @ (vectors * _inverse(scales)) @ vectors.T @ self._root
        inverse = self._power(_inverse(self._scales))
        back = inverse @ (vectors * scales) @ vectors.T @ inverse
        return (
            _slope(samples, mean, mean - self.mean, forth),
            _slope(real, self.mean, self.mean - mean, back),
        )


def _inverse(scales: Tensor) -> Tensor:
    """1 / scales, or 0 where they are rounding errors: roots of eigenvalues."""
    return torch.where(scales > _RANK**0.5 * scales.max(), 1 / scales, 0.0)


def _slope(features: Tensor, mean: Tensor, offset: Tensor, transport: Tensor) -> np.ndarray:
    centred = features.double() - mean
    quadratic = (centred * (centred - centred @ transport)).sum(1)
    found: np.ndarray = (2 * (centred @ offset) + quadratic).numpy()
    return found
