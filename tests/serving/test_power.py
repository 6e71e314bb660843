"""The power of samples, against simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from numprune.serving.power import power, samples_needed, student


@pytest.mark.parametrize("n", [2, 3, 10, 400])
@pytest.mark.parametrize("shift", [-1.0, 0.0, 0.5, 2.0, 3.0])
def test_power_matches_the_t_test(n: int, shift: float) -> None:
    expected = stats.nct.sf(stats.t.ppf(0.95, n - 1), n - 1, shift)
    assert power(n, 0.1, 0.1 * shift) == pytest.approx(expected, abs=1e-9)


def test_power_at_its_ends() -> None:
    assert power(10, 1.0, 0.0) == pytest.approx(0.05)
    assert power(10, 0.0, 0.1) == power(10, 0.0, 0.0) == 1
    assert power(10, 0.0, -0.1) == 0
    assert power(2, 1e-300, 1.0) == pytest.approx(1)
    assert power(2, 1e-300, -1.0) == pytest.approx(0)


@pytest.mark.parametrize("n", [5, 20])
def test_the_samples_needed_settle_four_of_five(n: int) -> None:
    """Truths lie evenly about the limit, 0; where the first n samples leave it open, as many as asked for are drawn."""
    generator = np.random.default_rng(n)
    settled: list[bool] = []
    while len(settled) < 2000:
        truth = generator.uniform(-3, 3)
        x = generator.normal(truth, math.sqrt(n), n)
        half = student(n) * x.std(ddof=1) / math.sqrt(n)
        if abs(x.mean()) > half:
            continue
        needed = samples_needed(n, half, half, -x.mean())
        assert needed is not None
        # Mean and standard deviation of that many, drawn as such.
        mean = generator.normal(truth, math.sqrt(n / needed))
        error = math.sqrt(n * generator.chisquare(needed - 1) / (needed - 1) / needed)
        settled.append(abs(mean) > student(needed) * error)
    assert np.mean(settled) == pytest.approx(0.8, abs=4 * math.sqrt(0.8 * 0.2 / 2000))


def test_samples_needed_at_the_limit_and_far_from_it() -> None:
    assert samples_needed(100, 1.0, 1.0, 0.0) == pytest.approx(41 * 100, rel=0.03)
    assert samples_needed(100, 1.0, 1.0, 0.999) == samples_needed(100, 1.0, 1.0, -0.999) < 500
    assert samples_needed(100, 0.0, 0.0, 0.0) is None
    assert samples_needed(2, 1e300, 1e300, 0.0) == samples_needed(2, 1.0, 1.0, 0.0)
    assert samples_needed(100, math.inf, 1.0, 0.0) is None
    assert samples_needed(100, 1e308, 1e308, 0.0) is None
    for n in (1 << 40, 1 << 51, 1 << 52):
        needed = samples_needed(n, 1.0, 1.0, 0.9)
        assert needed is None or needed > n


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.99])
def test_the_stated_probability_is_conditional_on_the_observation(share: float) -> None:
    """Given 40 samples: standard deviation and truth drawn as they then may be, and a larger measurement of them."""
    n, draws = 40, 200_000
    generator = np.random.default_rng(40)
    limit = share * student(n)  # the value is 0, its standard error 1
    needed = samples_needed(n, student(n), student(n), limit)
    assert needed is not None
    sd = math.sqrt(n) * np.sqrt((n - 1) / generator.chisquare(n - 1, draws))
    truth = generator.normal(0, sd / math.sqrt(n))
    mean = generator.normal(truth, sd / math.sqrt(needed))
    bound = student(needed) * sd * np.sqrt(generator.chisquare(needed - 1, draws) / (needed - 1) / needed)
    assert np.mean(abs(limit - mean) > bound) == pytest.approx(0.8, abs=0.01)
