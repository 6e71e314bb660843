"""FID by its definition, without bias, and with intervals that cover the truth, by counting."""

import numpy as np
import pytest
import torch
from scipy import linalg

from numprune.frechet import compare_frechet, frechet_distance


def features(seed, n, d, scale=1.0, offset=0.0):
    return offset + scale * torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_definition(first, second):
    """With the matrix square root of SciPy, as it is commonly computed."""
    first, second = first.numpy(), second.numpy()
    covariances = [np.cov(one, rowvar=False) for one in (first, second)]
    root = linalg.sqrtm(covariances[0] @ covariances[1]).real
    apart = first.mean(0) - second.mean(0)
    return apart @ apart + np.trace(covariances[0] + covariances[1] - 2 * root)


def shaped(values, covariance, mean):
    """The features with exactly this covariance and mean."""
    centred = values - values.mean(0)
    root = torch.linalg.cholesky(centred.T @ centred / (len(values) - 1))
    return torch.linalg.solve_triangular(root, centred.T, upper=False).T @ torch.linalg.cholesky(covariance).T + mean


def test_the_distance_is_that_of_the_definition():
    first, second = features(0, 40, 6), features(1, 50, 6, 1.4, 0.2) @ features(2, 6, 6)
    assert frechet_distance(first, second) == pytest.approx(by_definition(first, second), rel=1e-9)
    assert frechet_distance(second, first) == pytest.approx(by_definition(first, second), rel=1e-9)
    assert frechet_distance(first.float(), second.float()) == pytest.approx(by_definition(first, second), rel=1e-4)


def test_equal_sets_have_no_distance_even_with_fewer_images_than_features():
    for n in (200, 5):
        assert frechet_distance(features(0, n, 8), features(0, n, 8)) == pytest.approx(0, abs=1e-6)


def test_known_gaussians():
    eye = torch.eye(3, dtype=torch.float64)
    first = shaped(features(0, 30, 3), 4 * eye, torch.tensor([0.0, 0.0, 0.0]))
    second = shaped(features(1, 40, 3), 9 * eye, torch.tensor([1.0, 2.0, 0.0]))
    assert frechet_distance(first, second) == pytest.approx(1 + 4 + 3 * (3 - 2) ** 2)


def test_published_figures_are_those_of_all_images():
    real, baseline, candidate = features(0, 60, 4), features(1, 70, 4, 1.2), features(2, 70, 4, 1.3, 0.1)
    first, second, delta = compare_frechet(real, baseline, candidate)
    assert first.published == pytest.approx(by_definition(real, baseline))
    assert second.published == pytest.approx(by_definition(real, candidate))
    assert delta.value == pytest.approx(second.extrapolated.value - first.extrapolated.value)
    assert (delta.samples, delta.sampling_unit) == (70, "image")
    again = compare_frechet(real, baseline, candidate)
    assert again[2] == delta


def test_equal_samples_do_not_differ():
    real, samples = features(0, 60, 4), features(1, 60, 4, 1.2)
    _, _, delta = compare_frechet(real, samples, samples)
    assert (delta.value, delta.ci95_lower, delta.ci95_upper) == (0, 0, 0)


@pytest.mark.slow
@pytest.mark.parametrize(("d", "n", "times"), [(8, 400, 150), (8, 32, 200)])
def test_the_bias_is_gone_and_bounds_err_as_often_as_they_say(d, n, times):
    """Against the exact distances of Gaussians of standard deviation 1, 1.2 and 1.3, paired like samples of one noise.

    With four images for each feature bounds are wide, and err less often.
    """
    truth = np.array([d * 0.2**2, d * 0.3**2, d * 0.3**2 - d * 0.2**2])
    values, below, above, published = np.zeros(3), np.zeros(3), np.zeros(3), np.zeros(2)
    for time in range(times):
        noise = features(3 * time, n, d)
        other = 0.8 * noise + 0.6 * features(3 * time + 1, n, d)
        first, second, delta = compare_frechet(features(3 * time + 2, n, d), 1.2 * noise, 1.3 * other, seed=time)
        found = [first.extrapolated, second.extrapolated, delta]
        values += [one.value / times for one in found]
        published += np.array([first.published, second.published]) / times
        below += [one.ci95_upper < expected for one, expected in zip(found, truth, strict=True)]
        above += [one.ci95_lower > expected for one, expected in zip(found, truth, strict=True)]
    assert (np.abs(values - truth)[:2] < 0.2 * (published - truth[:2])).all()
    assert (below / times <= 0.1).all()
    assert (above / times <= 0.1).all()
    if n == 400:
        assert ((below + above) / times >= 0.02).all()  # not merely wide
