"""The change of accuracy on the same items: exact values, coverage, and McNemar's test."""

import math

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest

from numprune.paired import accuracy_delta, mcnemar, paired_accuracy


def test_flips_are_counted_by_item() -> None:
    baseline = np.array([True, True, True, False, False, True])
    candidate = np.array([True, False, False, True, False, True])
    found = paired_accuracy(baseline, candidate)
    assert (found.items, found.right_to_wrong, found.wrong_to_right) == (6, 2, 1)
    assert found.baseline == pytest.approx(4 / 6)
    assert found.candidate == pytest.approx(3 / 6)
    assert found.accuracy_delta.value == pytest.approx(-1 / 6)
    assert (found.accuracy_delta.samples, found.accuracy_delta.sampling_unit) == (6, "item")


@pytest.mark.parametrize(("lost", "gained", "n"), [(12, 5, 200), (3, 9, 50), (1, 0, 44)])
def test_a_bound_solves_the_score_equation(lost: int, gained: int, n: int) -> None:
    """With the probability of a loss found by maximizing the likelihood numerically, not in closed form."""
    found = accuracy_delta(lost, gained, n)
    for change, expected in [(found.ci95_lower, 1.6448536269514722), (found.ci95_upper, -1.6448536269514722)]:

        def unlikely(q: float, change: float = change) -> float:
            terms = [(lost, q), (gained, q + change), (n - lost - gained, 1 - 2 * q - change)]
            return -sum(count * math.log(p) for count, p in terms if count)

        least, most = max(0.0, -change), (1 - change) / 2
        margin = 1e-9 * (most - least)
        q = minimize_scalar(
            unlikely, bounds=(least + margin, most - margin), method="bounded", options={"xatol": 1e-12}
        ).x
        score = (gained - lost - n * change) / math.sqrt(n * (2 * q + change * (1 - change)))
        assert score == pytest.approx(expected, abs=1e-3)


def test_without_flips_the_bound_is_known_in_closed_form() -> None:
    squared = 1.6448536269514722**2
    for n in (10, 1000):
        found = accuracy_delta(0, 0, n)
        assert found.value == 0
        assert found.ci95_lower == pytest.approx(-squared / (n + squared), abs=1e-9)
        assert found.ci95_upper == pytest.approx(squared / (n + squared), abs=1e-9)


@pytest.mark.parametrize(
    ("lost", "gained", "n"), [(0, 0, 1), (1, 0, 1), (0, 5, 5), (5, 0, 5), (3, 7, 40), (90, 2, 500)]
)
def test_bounds_ascend_around_the_value_and_mirror(lost: int, gained: int, n: int) -> None:
    found, mirrored = accuracy_delta(lost, gained, n), accuracy_delta(gained, lost, n)
    low, high = found.interval95
    ordered = [-1.0, low, found.ci95_lower, found.value, found.ci95_upper, high, 1.0]
    assert ordered == sorted(ordered)
    assert mirrored.ci95_lower == pytest.approx(-found.ci95_upper, abs=1e-9)
    assert mirrored.interval95 == pytest.approx((-high, -low), abs=1e-9)


def test_a_bound_at_zero_is_mcnemars_test() -> None:
    """The lower bound is above zero exactly when (c - b) / sqrt(b + c) exceeds the quantile."""
    for lost, gained in [(2, 9), (4, 9), (10, 20), (10, 22)]:
        significant = (gained - lost) / math.sqrt(gained + lost) > 1.6448536269514722
        assert (accuracy_delta(lost, gained, 300).ci95_lower > 0) == significant


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (0, 6), (6, 0), (5, 5), (30, 12)])
def test_mcnemar_is_the_exact_binomial_test(lost: int, gained: int) -> None:
    expected = binomtest(gained, lost + gained).pvalue if lost + gained else 1.0
    assert mcnemar(lost, gained) == pytest.approx(expected)


def test_a_candidate_at_the_limit_passes_at_most_6_percent_of_the_time() -> None:
    """Exactly: over every pair of counts, weighted by its probability."""
    n, limit, flips = 200, -0.03, 0.08
    gained_share = (flips + limit) / 2 / flips
    weights = _binomial(n, flips)
    passes = 0.0
    for total in np.flatnonzero(weights > 1e-9).tolist():
        by_gained = _binomial(total, gained_share)
        for gained in range(total + 1):
            if by_gained[gained] > 1e-9 and accuracy_delta(total - gained, gained, n).ci95_lower >= limit:
                passes += float(weights[total] * by_gained[gained])
    assert 0.03 < passes < 0.06


def _binomial(n: int, p: float) -> np.ndarray:
    """(n + 1,) probabilities."""
    return np.array([math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)])
