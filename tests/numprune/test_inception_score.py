"""The Inception Score by its definition, and bounds that err as often as they say, by counting."""

import numpy as np
import pytest
import torch

from numprune.inception_score import SPLITS, compare_scores


def probabilities(seed, n, classes, sharpness=1.0):
    logits = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mix = torch.randn(3, classes, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    return (sharpness * logits @ mix).softmax(1)


def by_definition(found):
    return float((found * (found.log() - found.mean(0).log())).sum(1).mean().exp())


def test_sure_and_varied_samples_have_as_many_as_there_are_classes():
    sure = torch.eye(5, dtype=torch.float64).repeat(400, 1)
    first, second, delta = compare_scores(sure, torch.full((2000, 5), 0.2))
    assert first.extrapolated.value == pytest.approx(5, rel=1e-2)
    assert (second.published, second.extrapolated.value) == pytest.approx((1, 1))
    assert delta.value == pytest.approx(second.extrapolated.value - first.extrapolated.value)


def test_the_published_score_is_the_mean_over_ten_parts():
    found = probabilities(0, 200, 6)
    order = np.random.default_rng(0).permutation(200)
    parts = [by_definition(found[part]) for part in np.array_split(order, SPLITS)]
    first, _, _ = compare_scores(found, found)
    assert (first.published, first.deviation) == pytest.approx((np.mean(parts), np.std(parts)))
    assert first.published < by_definition(found) < first.extrapolated.value


@pytest.mark.slow
def test_the_bias_is_gone_and_bounds_err_as_often_as_they_say():
    classes, n, times = 20, 300, 200
    exact = [by_definition(probabilities(10_000, 200_000, classes, sharpness)) for sharpness in (1.0, 0.9)]
    truth = np.array([*exact, exact[1] - exact[0]])
    values, below, above, published = np.zeros(3), np.zeros(3), np.zeros(3), 0.0
    for time in range(times):
        first, second, delta = compare_scores(*(probabilities(time, n, classes, by) for by in (1.0, 0.9)))
        found = [first.extrapolated, second.extrapolated, delta]
        values += [one.value / times for one in found]
        published += first.published / times
        below += [one.ci95_upper < expected for one, expected in zip(found, truth, strict=True)]
        above += [one.ci95_lower > expected for one, expected in zip(found, truth, strict=True)]
    assert abs(values[0] - truth[0]) < 0.2 * abs(published - truth[0])
    assert (below / times <= 0.1).all()
    assert (above / times <= 0.1).all()
    assert ((below + above) / times >= 0.02).all()
