"""Accuracy of two models on the same items, and the change with its uncertainty.

Only items that one model answers right and the other wrong (flips) are informative about the change. Notation: n items,
b flips from right to wrong, c from wrong to right; the change of accuracy is d = (c - b) / n.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy import special

from numprune.bootstrap import Estimate

_STEPS = 60  # bisections of [-1, 1]; 2 ** -59 is below the precision of a double near 1


@dataclass(frozen=True)
class PairedAccuracy:
    """Accuracies in [0, 1].

    Attributes:
        right_to_wrong, wrong_to_right: items, from the baseline to the candidate.
        accuracy_delta: candidate - baseline, sampled by item.
        mcnemar_p: two-sided p value of McNemar's exact test that neither kind of flip is more likely.
    """

    items: int
    baseline: float
    candidate: float
    right_to_wrong: int
    wrong_to_right: int
    accuracy_delta: Estimate
    mcnemar_p: float


def paired_accuracy(baseline: np.ndarray, candidate: np.ndarray) -> PairedAccuracy:
    """Compare two models' answers.

    Args:
        baseline, candidate: (n,) bool, right or wrong on the same items in the same order; n >= 1.
    """
    n = len(baseline)
    lost, gained = int((baseline & ~candidate).sum()), int((~baseline & candidate).sum())
    return PairedAccuracy(
        n,
        float(baseline.mean()),
        float(candidate.mean()),
        lost,
        gained,
        accuracy_delta(lost, gained, n),
        mcnemar(lost, gained),
    )


def accuracy_delta(lost: int, gained: int, n: int) -> Estimate:
    """Return the change of accuracy with Tango's score bounds.

    A bound is the change at which the score statistic equals the normal quantile (Tango, Statistics in Medicine 17,
    1998). At a change of zero, it is McNemar's statistic. Unlike the bootstrap, it has a width even without flips: n
    equal answers are compatible with changes down to -z^2 / (n + z^2).
    """
    low, lower, upper, high = (_bound(lost, gained, n, p) for p in (0.025, 0.05, 0.95, 0.975))
    return Estimate((gained - lost) / n, lower, upper, (low, high), n, "item")


def mcnemar(lost: int, gained: int) -> float:
    """Two-sided p value of McNemar's exact test: of `lost + gained` flips, `gained` is binomial of probability 1/2."""
    return min(1.0, 2 * float(special.bdtr(min(lost, gained), lost + gained, 0.5)))


def _bound(lost: int, gained: int, n: int, probability: float) -> float:
    """The change at which the score statistic is the quantile of 1 - probability; it falls as the change rises."""
    quantile = -float(special.ndtri(probability))
    low, high = -1.0, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if _score(lost, gained, n, middle) > quantile else (low, middle)
    return (low + high) / 2


def _score(lost: int, gained: int, n: int, change: float) -> float:
    """Tango's statistic (c - b - n d) / sqrt(n (2 q + d (1 - d))) of a true change d.

    q is the most likely probability of a flip from right to wrong, given d.
    """
    linear = (2 * n + lost - gained) * change - lost - gained
    constant = -lost * change * (1 - change)
    q = (math.sqrt(max(linear * linear - 8 * n * constant, 0.0)) - linear) / (4 * n)
    variance = n * (2 * q + change * (1 - change))
    distance = gained - lost - n * change
    return distance / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, distance) if distance else 0.0
