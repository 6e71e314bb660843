"""Statistical power: the chance that a gate passes a good candidate, and the samples needed for a verdict.

Notation: n samples; value v; its one-sided bounds are v - b and v + a; the gate passes when v + a <= L (minima are
mirrored). t(n) is Student's quantile of the bounds' confidence and n - 1 degrees of freedom, and a = t(n) se for a
standard error se.
"""

import math

from scipy import special

CONFIDENCE = 0.95
MAXIMUM = 1 << 52  # beyond this, a double cannot count samples exactly
SETTLED = 0.80  # probability of a verdict with `samples_needed` samples


def power(n: int, standard_error: float, margin: float, confidence: float = CONFIDENCE) -> float:
    """Chance that a candidate passes if its true value is within the limit by `margin`.

    P(T >= t(n)) with T noncentral t of n - 1 degrees of freedom and noncentrality margin / se: with se = sd / sqrt(n)
    this is the power of the one-sided t test (Chow, Shao and Wang, Sample Size Calculations in Clinical Research,
    3.2). A candidate exactly at the limit passes with 1 - confidence.
    """
    if standard_error == 0:
        return float(margin >= 0)
    noncentrality = min(max(margin / standard_error, -37.0), 37.0)  # beyond this, the result rounds to 0 or 1
    return 1 - float(special.nctdtr(n - 1, noncentrality, student(n, confidence)))


def samples_needed(n: int, below: float, above: float, distance: float, confidence: float = CONFIDENCE) -> int | None:
    """Fewest samples that give a verdict, pass or fail, with 80 % probability, judging by these n.

    The value is not assumed to stay the same. Given only these samples, the true value is distributed about v with se
    t(n - 1), and v', measured again from N samples, with se sqrt(1 + n / N). Its bounds are closer by r = sqrt(n / N)
    t(N) / t(n). With d = L - v and F the distribution function of Student's t for n,

        P(N) = F((d - r a) / (se sqrt(1 + n / N))) + F((-d - r b) / (se sqrt(1 + n / N)))

    is the probability of a pass plus that of a fail. It rises with N to 1. For a value exactly at its limit N is about
    41 n, because the true value is most probably not there. (The number for which v' passes with 80 % if the true value
    is v is smaller for values far from the limit, and unbounded near it.)

    Args:
        below, above: b and a, nonnegative.
        distance: L - v.

    Returns:
        N > n; None if the spread is zero or infinite.
    """
    error = (below + above) / (2 * student(n, confidence))
    if not 0 < error < math.inf:
        return None

    def settled(more: int) -> bool:
        nearer = math.sqrt(n / more) * student(more, confidence) / student(n, confidence)
        wider = error * math.sqrt(1 + n / more)
        passes, fails = (distance - nearer * above) / wider, (-distance - nearer * below) / wider
        return float(special.stdtr(n - 1, passes) + special.stdtr(n - 1, fails)) >= SETTLED

    high = n + 1
    while not settled(high):
        if high > MAXIMUM:
            return None
        high *= 2
    low = n
    while high - low > 1:  # P rises
        middle = (low + high) // 2
        low, high = (low, middle) if settled(middle) else (middle, high)
    return high


def student(n: int, confidence: float = CONFIDENCE) -> float:
    """Student's quantile for n samples, n >= 2."""
    return float(special.stdtrit(n - 1, confidence))
