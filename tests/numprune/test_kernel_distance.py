"""KID by its definition, and bounds that err as often as they say, by counting."""

import numpy as np
import pytest
import torch

from numprune.kernel_distance import compare_kernels


def features(seed, n, d, scale=1.0, offset=0.0):
    return offset + scale * torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_definition(real, samples):
    def kernel(x, y):
        return (float(x @ y) / len(x) + 1) ** 3

    within = np.mean([kernel(x, y) for i, x in enumerate(samples) for j, y in enumerate(samples) if i != j])
    among = np.mean([kernel(x, y) for i, x in enumerate(real) for j, y in enumerate(real) if i != j])
    return within + among - 2 * np.mean([kernel(x, y) for x in samples for y in real])


def test_the_distance_is_that_of_the_definition():
    real, baseline, candidate = features(0, 12, 3), features(1, 9, 3, 1.3), features(2, 9, 3, 1.1, 0.5)
    first, second, delta = compare_kernels(real, baseline, candidate)
    assert first.value == pytest.approx(by_definition(real, baseline))
    assert second.value == pytest.approx(by_definition(real, candidate))
    assert delta.value == pytest.approx(second.value - first.value)
    assert delta.sampling_unit == "image"


def test_many_images_are_compared_in_parts(monkeypatch):
    monkeypatch.setattr("numprune.kernel_distance._ROWS", 7)
    parts = compare_kernels(features(0, 30, 3), features(1, 20, 3), features(2, 20, 3))
    monkeypatch.undo()
    for one, other in zip(
        parts, compare_kernels(features(0, 30, 3), features(1, 20, 3), features(2, 20, 3)), strict=True
    ):
        assert one.interval95 == pytest.approx(other.interval95)


def test_equal_samples_do_not_differ():
    samples = features(1, 30, 3)
    _, _, delta = compare_kernels(features(0, 30, 3), samples, samples)
    assert delta.interval95 == (0, 0)


@pytest.mark.slow
def test_there_is_no_bias_and_bounds_err_as_often_as_they_say():
    """Against the mean of many draws; the first generator draws from the distribution of the real images."""
    d, n, times = 8, 200, 150
    draws = []
    for time in range(times):
        noise = features(3 * time, n, d)
        other = 0.8 * noise + 0.6 * features(3 * time + 1, n, d)
        draws.append(compare_kernels(features(3 * time + 2, n, d), noise, 1.2 * other + 0.2))
    values = np.array([[one.value for one in draw] for draw in draws])
    truth, noise = values.mean(0), values.std(0) / times**0.5
    assert abs(truth[0]) < 4 * noise[0]
    below = np.mean([[one.ci95_upper for one in draw] < truth for draw in draws], 0)
    above = np.mean([[one.ci95_lower for one in draw] > truth for draw in draws], 0)
    assert (below <= 0.1).all()
    assert (above <= 0.1).all()
    assert below[2] + above[2] >= 0.01
