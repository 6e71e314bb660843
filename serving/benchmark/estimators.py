"""Statistics of repeated timings: percentiles, the ratio of two sides, and the noise floor of a ratio."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

PERCENTILES = (50, 90, 95, 99)


def samples_needed(percentile: int) -> int:
    """Fewest samples that support a percentile.

    The rule: with 95 % confidence the true percentile must lie between the smallest and the largest sample. Of n
    independent samples all lie below the quantile q with probability q^n, all above it with (1-q)^n; their sum must be
    at most 0.05. That requires 6 samples for p50, 29 for p90, 59 for p95 and 299 for p99. With fewer samples, the
    percentile would just be the maximum.
    """
    q = percentile / 100
    n = 1
    while q**n + (1 - q) ** n > 0.05:
        n += 1
    return n


_NEEDED = {percentile: samples_needed(percentile) for percentile in PERCENTILES}


def percentiles(samples: Sequence[float]) -> dict[str, float | int]:
    """`{"samples": n, "p50": …, "p90": …}` in the samples' unit; a percentile without enough samples is left out."""
    supported = [percentile for percentile in PERCENTILES if len(samples) >= _NEEDED[percentile]]
    return {"samples": len(samples)} | {f"p{p}": float(np.percentile(samples, p)) for p in supported}


def paired_ratio(candidate: Sequence[float], baseline: Sequence[float]) -> dict[str, Any]:
    """The ratio candidate/baseline, one pair per repeat, with its 95 % bounds, as an estimate of the report.

    The value is the geometric mean of the pairs' ratios; the bounds are Student's, on the mean of their logarithms.
    Student's t rather than the bootstrap, because there are few repeats: with 10 of them the nominal 95 % percentile
    bootstrap covers only about 90 % (it has neither the n-1 nor the t). Student's interval is exact for normal log
    ratios and close to exact for real timings, because the difference within a pair removes common skew: with drift,
    stalls of both sides and uneven noise it is wrong 5 % of the time or less (counted by `python -m
    numprune.flows.studies.error_rates`). No interval over so few repeats can account for rare stalls of one side alone
    that no repeat contained.

    Both sequences hold one positive, finite number per repeat; at least two, or ValueError.
    """
    logs = _logarithms(candidate, len(baseline)) - _logarithms(baseline, len(candidate))
    n = len(logs)
    if n < 2:
        raise ValueError(f"a ratio needs at least two pairs, got {n}")
    mean = float(logs.mean())
    error = float(logs.std(ddof=1)) / math.sqrt(n)
    one_sided, two_sided = (_student(p, n - 1) * error for p in (0.95, 0.975))
    return {
        "value": math.exp(mean),
        "ci95_lower": math.exp(mean - one_sided),
        "ci95_upper": math.exp(mean + one_sided),
        "interval95": [math.exp(mean - two_sided), math.exp(mean + two_sided)],
        "samples": n,
        "sampling_unit": "repeat",
    }


def noise_floor(
    neighbours: Sequence[tuple[float, float]], pairs: Sequence[tuple[float, float]]
) -> dict[str, float | int]:
    """How far from 1 the ratio of these pairs could be if both sides were the baseline.

    `neighbours` are the baseline's values in consecutive repeats ("A A" in A B B A A B …): as far apart in time as the
    two sides of a pair, and different only by noise. Their log ratios have mean 0 by construction, so the spread is
    their root mean square about 0, with as many degrees of freedom as neighbours; the order within a pair counts as
    noise, as it does in the pairs. `relative` is the half-width, e^h - 1, of the two-sided 95 % interval: a limit
    closer to 1 than that cannot be distinguished from noise.

    There are half as many neighbours as pairs, and occasional disturbances can miss all of them, so the floor is the
    spread of the pairs about their own mean if that is larger. With neighbours alone, stalls and other load carried a
    baseline beyond its own floor one time in four.
    """
    if not neighbours or not pairs:
        raise ValueError("a noise floor needs at least one pair and one of neighbouring baseline repeats")
    alone = _log_ratios(neighbours)
    half_width = _student(0.975, len(alone)) * math.sqrt(float(np.mean(alone**2)))
    if len(pairs) > 1:
        half_width = max(half_width, _student(0.975, len(pairs) - 1) * float(_log_ratios(pairs).std(ddof=1)))
    return {"relative": math.expm1(half_width / math.sqrt(len(pairs))), "neighbours": len(alone)}


def _student(probability: float, degrees: int) -> float:
    """The quantile of Student's t distribution."""
    from scipy import special  # imported here because the workers import this module, and their memory is measured

    return float(special.stdtrit(degrees, probability))


def _log_ratios(pairs: Sequence[tuple[float, float]]) -> np.ndarray:
    first, second = ([pair[side] for pair in pairs] for side in (0, 1))
    return _logarithms(second, len(pairs)) - _logarithms(first, len(pairs))


def _logarithms(values: Sequence[float], length: int) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.shape != (length,) or not np.all(np.isfinite(array)) or not np.all(array > 0):
        raise ValueError(f"needs {length} positive, finite numbers, got {values!r}")
    return np.log(array)
