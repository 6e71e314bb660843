"""The Inception Score of samples: how sure a classifier is of each, and how varied they are.

exp of the mean KL divergence of the classes of a sample from those of all samples (Salimans et al., "Improved
Techniques for Training GANs", 2016). Published is the mean over ten parts of the samples, which is too small by about a
constant over the number of samples in a part. Chong and Forsyth ("Effectively Unbiased FID and Inception Score and
Where to Find Them", 2020) extrapolate it to infinitely many samples along that line, here from the parts and from all
samples.

Notation: n samples, C classes.
"""

from dataclasses import dataclass

import numpy as np
from scipy import special
from torch import Tensor

from numprune.bootstrap import Estimate

SPLITS = 10


@dataclass(frozen=True)
class InceptionScore:
    """The score of a generator's samples.

    Attributes:
        published, deviation: mean and standard deviation over ten parts, as the literature reports them.
        extrapolated: to infinitely many samples, with its uncertainty.
    """

    published: float
    deviation: float
    extrapolated: Estimate


def compare_scores(baseline: Tensor, candidate: Tensor) -> tuple[InceptionScore, InceptionScore, Estimate]:
    """Return the score of both generators, and candidate - baseline.

    The variance is that of the score's derivative at each sample.

    Args:
        baseline, candidate: (n, C) probabilities of classes, n at least 2 * SPLITS; those of one row belong together.
    """
    sides = [_Score(side.double().numpy()) for side in (baseline, candidate)]
    first, second = (
        InceptionScore(float(side.parts.mean()), float(side.parts.std()), _estimate(side.value, side.slopes))
        for side in sides
    )
    return first, second, _estimate(sides[1].value - sides[0].value, sides[1].slopes - sides[0].slopes)


class _Score:
    """The score of probabilities (n, C): of `parts` (SPLITS,), its extrapolated `value`, its `slopes` (n,)."""

    def __init__(self, probabilities: np.ndarray) -> None:
        # At random: samples have their classes in turn.
        groups = np.array_split(np.random.default_rng(0).permutation(len(probabilities)), SPLITS)
        self.parts = np.array([np.exp(_divergences(probabilities[group]).mean()) for group in groups])
        divergences = _divergences(probabilities)
        whole = float(np.exp(divergences.mean()))
        self.value = (SPLITS * whole - float(self.parts.mean())) / (SPLITS - 1)
        self.slopes = whole * (divergences - divergences.mean())


def _estimate(value: float, slopes: np.ndarray) -> Estimate:
    spread = float(np.std(slopes, ddof=1)) / len(slopes) ** 0.5
    one, two = (float(special.stdtrit(len(slopes) - 1, p)) * spread for p in (0.95, 0.975))
    return Estimate(value, value - one, value + one, (value - two, value + two), len(slopes), "image")


def _divergences(probabilities: np.ndarray) -> np.ndarray:
    """KL divergence of each row from their mean, in nats."""
    found: np.ndarray = special.rel_entr(probabilities, probabilities.mean(0)).sum(1)
    return found
