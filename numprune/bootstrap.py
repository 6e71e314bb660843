"""Means over documents with their uncertainty."""

import math
from dataclasses import dataclass

import numpy as np
from scipy import special

_DRAWS = 10_000


@dataclass(frozen=True)
class Estimate:
    """A mean with its uncertainty.

    Attributes:
        value: the estimate.
        ci95_lower, ci95_upper: one-sided 95 % confidence bounds.
        interval95: the two-sided 95 % interval.
        samples: how many sampling units it is based on.
        sampling_unit: "document", or "window" if there are too few documents; "item" of a task; "image" of a generator.
    """

    value: float
    ci95_lower: float
    ci95_upper: float
    interval95: tuple[float, float]
    samples: int
    sampling_unit: str

    @property
    def exponential(self) -> "Estimate":
        """Return exp of the mean and of its bounds; exp is monotone."""
        low, high = self.interval95
        return Estimate(
            math.exp(self.value),
            math.exp(self.ci95_lower),
            math.exp(self.ci95_upper),
            (math.exp(low), math.exp(high)),
            self.samples,
            self.sampling_unit,
        )


def bootstrap_mean(sums: np.ndarray, counts: np.ndarray, unit: str, seed: int = 0) -> Estimate:
    """Return sum(sums) / sum(counts) with confidence bounds over the sampling units.

    A unit's weight is its length, so a few long documents can dominate, and differences of documents are skewed because
    losses are unbounded above. The percentile bootstrap ignores both: for 20 documents like those of the embedded text,
    its one-sided 95 % bound is below the truth more than one time in ten (measured by
    `python -m numprune.flows.studies.error_rates`). Therefore the bound is studentized,

        value + max(-q, t(n - 1)) * t(f) / t(n - 1) * s

    with s and f as in `_spread` (which accounts for few long units), t(f) Student's quantile of f degrees of freedom,
    and q the opposite quantile of (resampled mean - value) / its own standard error over 10,000 draws of the units,
    which accounts for the skew (the bootstrap-t: Efron and Tibshirani, An Introduction to the Bootstrap, 12.5;
    second-order correct). The lower bounds mirror it. With many units of similar length, it approaches the percentile
    interval.

    Args:
        sums: (n,) of the quantity in each unit.
        counts: (n,) tokens in each unit, positive.
        unit: name of the sampling unit, for the record.
        seed: of the draws.

    With a single unit, the spread is unknown: the bounds are infinite, and no gate on them can pass.
    """
    n = len(sums)
    value = float(sums.sum() / counts.sum())
    if n < 2:
        return Estimate(value, -math.inf, math.inf, (-math.inf, math.inf), n, unit)
    lengths = counts / counts.mean()
    residuals = sums / counts.mean() - value * lengths  # (n,) they sum to zero; zero for a unit equal to the mean
    spread, freedom = _spread(residuals, lengths)
    drawn = _studentized(residuals, lengths, seed)

    def distance(probability: float, quantile: float) -> float:
        student = special.stdtrit(n - 1, probability)
        return float(max(quantile, student) * special.stdtrit(freedom, probability) / student * spread)

    low, lower, upper, high = np.quantile(drawn, [0.025, 0.05, 0.95, 0.975]).tolist() if len(drawn) else [0.0] * 4
    return Estimate(
        value,
        value - distance(0.95, upper),
        value + distance(0.95, -lower),
        (value - distance(0.975, high), value + distance(0.975, -low)),
        n,
        unit,
    )


def _spread(residuals: np.ndarray, lengths: np.ndarray) -> tuple[float, float]:
    """Return the standard error of a mean weighted by length, and its degrees of freedom.

    The unbiased sandwich estimator with Satterthwaite's degrees of freedom, for sums with a variance proportional to
    the squared length, as when each document differs by its own amount (Bell and McCaffrey, Survey Methodology 28,
    2002). With equal lengths, these are the usual s / sqrt(n) and n - 1.

    Args:
        residuals: (n,) sum - mean * length, of each unit.
        lengths: (n,) positive, of mean 1.
    """
    n = len(lengths)
    h = lengths / n  # share of each unit
    v = h * h
    total = v.sum()
    # E[residual_i residual_j] is [i = j] v_i + o_ij with o_ij = h_i h_j total - v_i h_j - h_i v_j.
    own = total * v - 2 * v * h
    a = v / (v + own)
    spread = math.sqrt((a * residuals**2).sum()) / n
    vv, vh, hh = (a * v * v).sum(), (a * v * h).sum(), (a * v).sum()
    crossed = 2 * vv * hh + 2 * vh * vh + (hh * total) ** 2 - 4 * vh * hh * total  # sum over i, j of a_i a_j o_ij^2
    squared = crossed + (v * v - (a * own) ** 2).sum()
    return spread, max(total * total / squared, 1.0)


def _studentized(residuals: np.ndarray, lengths: np.ndarray, seed: int) -> np.ndarray:
    """Return (resampled mean - mean) / its standard error, for each draw that has one."""
    n = len(lengths)
    generator = np.random.default_rng(seed)
    columns = np.stack([residuals, lengths, residuals**2, residuals * lengths, lengths**2], axis=1)
    chunk = max(1, 2_000_000 // n)
    drawn = []
    for start in range(0, _DRAWS, chunk):
        rows = min(chunk, _DRAWS - start)
        units = generator.integers(0, n, (rows, n)) + n * np.arange(rows)[:, None]
        times = np.bincount(units.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)
        e, c, ee, ec, cc = (times @ columns).T
        shift = e / c
        squared = (ee - 2 * shift * ec + shift**2 * cc) * n / (n - 1)
        sound = squared > 1e-12 * ee  # otherwise the same unit was drawn every time
        drawn.append(shift[sound] * c[sound] / np.sqrt(squared[sound]))
    return np.concatenate(drawn)
