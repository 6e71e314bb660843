import math

import numpy as np
import pytest
from scipy import stats

from numprune.serving.benchmark.estimators import (
    noise_floor,
    paired_ratio,
    percentiles,
    samples_needed,
)


def test_the_ratio_is_the_geometric_mean_with_student_bounds():
    baseline = [10.0, 20.0, 40.0, 10.0]
    candidate = [11.0, 25.0, 44.0, 13.0]
    logs = np.log(candidate) - np.log(baseline)
    expected = stats.t.interval(0.95, 3, loc=logs.mean(), scale=stats.sem(logs))
    one_sided = stats.t.interval(0.90, 3, loc=logs.mean(), scale=stats.sem(logs))

    ratio = paired_ratio(candidate, baseline)

    assert ratio["value"] == pytest.approx((1.1 * 1.25 * 1.1 * 1.3) ** 0.25)
    assert ratio["interval95"] == pytest.approx(np.exp(expected))
    assert [ratio["ci95_lower"], ratio["ci95_upper"]] == pytest.approx(np.exp(one_sided))
    assert (ratio["samples"], ratio["sampling_unit"]) == (4, "repeat")


def test_common_effects_of_a_pair_cancel():
    drift = np.array([1.0, 3.0, 0.2, 7.0])
    ratio = paired_ratio(list(1.5 * drift), list(drift))
    assert ratio["interval95"] == pytest.approx([1.5, 1.5])


@pytest.mark.parametrize("noise", ["normal", "skewed"])
def test_intervals_have_nominal_coverage(noise):
    """Ten pairs, a drift both sides share, true ratio 1.2; "skewed" timings have exponential delays on top."""
    generator = np.random.default_rng(0)
    covered = below = above = 0
    experiments = 2000
    for _ in range(experiments):
        if noise == "normal":
            sides = np.exp(generator.normal(0, 0.05, size=(2, 10)))
        else:
            sides = 1 + generator.exponential(0.05, size=(2, 10))
        sides = sides * np.exp(generator.normal(0, 0.5, size=10))
        ratio = paired_ratio(list(1.2 * sides[0]), list(sides[1]))
        covered += ratio["interval95"][0] <= 1.2 <= ratio["interval95"][1]
        below += ratio["ci95_lower"] <= 1.2
        above += ratio["ci95_upper"] >= 1.2
    # Three standard errors of 2,000 draws are 1.5 points.
    assert [covered / experiments, below / experiments, above / experiments] == pytest.approx([0.95] * 3, abs=0.015)


@pytest.mark.parametrize("stalls", [0.0, 0.1])
def test_the_noise_floor_covers_the_baseline_against_itself(stalls):
    """Also where one repeat in ten stalls: what the few neighbours missed, the pairs have seen."""
    generator = np.random.default_rng(1)
    inside = 0
    experiments = 1000
    for _ in range(experiments):
        logs = generator.normal(0, 0.03, size=(2, 14))
        logs += generator.exponential(0.3, size=(2, 14)) * (generator.random((2, 14)) < stalls)
        pairs = [(float(a), float(b)) for a, b in np.exp(logs.T)]
        floor = noise_floor(pairs[10:], pairs[:10])
        ratio = paired_ratio([b for _, b in pairs[:10]], [a for a, _ in pairs[:10]])["value"]
        inside += abs(math.log(ratio)) <= math.log1p(floor["relative"])
    assert inside / experiments >= 0.95
    assert inside / experiments <= 0.995


def test_the_noise_floor_is_the_larger_of_neighbours_and_pairs():
    still = [(1.0, 1.2)] * 4  # pairs that do not vary say nothing of noise
    alone = noise_floor([(1.0, 1.1), (1.0, 0.9)], still)
    logs = np.log([1.1, 0.9])
    expected = stats.t.ppf(0.975, 2) * math.sqrt(np.mean(logs**2)) / 2
    assert alone == {"relative": pytest.approx(math.expm1(expected)), "neighbours": 2}
    varying = [(1.0, 1.2), (1.0, 1.6), (1.0, 1.2), (1.0, 0.7)]
    interval = paired_ratio([b for _, b in varying], [a for a, _ in varying])
    half_width = interval["interval95"][1] / interval["value"] - 1
    assert noise_floor([(1.0, 1.01)] * 4, varying)["relative"] == pytest.approx(half_width)


def test_an_order_effect_raises_the_noise_floor():
    assert noise_floor([(1.0, 1.1), (1.0, 1.1)], [(1.0, 1.0)] * 4)["relative"] > 0.1
    assert noise_floor([(1.0, 1.0)], [(1.0, 1.0)] * 4) == {"relative": 0.0, "neighbours": 1}


def test_percentiles_need_enough_samples():
    assert [samples_needed(percentile) for percentile in (50, 90, 95, 99)] == [6, 29, 59, 299]
    assert percentiles([]) == {"samples": 0}
    assert percentiles([1.0] * 5) == {"samples": 5}
    assert percentiles(list(range(1, 29))) == {"samples": 28, "p50": 14.5}
    assert percentiles(list(range(1, 60))).keys() == {"samples", "p50", "p90", "p95"}
    values = list(range(1001))
    assert percentiles(values) == {"samples": 1001, "p50": 500.0, "p90": 900.0, "p95": 950.0, "p99": 990.0}


@pytest.mark.parametrize("bad", [[1.0, 0.0], [1.0, -2.0], [1.0, math.nan], [1.0, math.inf], [1.0]])
def test_invalid_times_are_refused(bad):
    with pytest.raises(ValueError):
        paired_ratio(bad, [1.0, 1.0])
    with pytest.raises(ValueError):
        paired_ratio([1.0, 1.0], bad)


def test_too_few_pairs_are_refused():
    with pytest.raises(ValueError, match="at least two pairs"):
        paired_ratio([1.0], [1.0])
    for neighbours, pairs in [([], [(1.0, 1.0)] * 4), ([(1.0, 1.0)], [])]:
        with pytest.raises(ValueError, match="at least one pair"):
            noise_floor(neighbours, pairs)
