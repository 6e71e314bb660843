"""Compensation against `torch.linalg.lstsq` on the data of the moments."""

import pytest
import torch

from numprune.compensation import choose_damping, mean_bias, refit
from numprune.moments import Moments

KEPT = torch.tensor([0, 2, 3, 7, 9])


def data(seed=0, samples=200, channels=10, out=4):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(channels, channels, generator=generator, dtype=torch.float64)
    x = torch.randn(samples, channels, generator=generator, dtype=torch.float64) @ mixing + 1.5
    weight = torch.randn(out, channels, generator=generator, dtype=torch.float64)
    noise = torch.randn(samples, channels, generator=generator, dtype=torch.float64)
    return x, x + 0.1 * noise, weight, torch.randn(out, generator=generator, dtype=torch.float64)


def moments_of(x, y):
    moments = Moments(x.shape[1], outputs=y.shape[1])
    moments.add(x, y)
    return moments


def test_oneshot_is_least_squares_on_the_kept_channels():
    x, _, weight, _ = data()
    y = x @ weight.T
    columns, bias = refit(weight, None, KEPT, moments_of(x, y), damping=0)
    torch.testing.assert_close(columns, torch.linalg.lstsq(x[:, KEPT], y).solution.T)
    assert bias is None


def test_oneshot_matches_theorem_3():
    x, _, weight, _ = data()
    moments = moments_of(x, x @ weight.T)
    gram = moments.gram
    removed = torch.tensor([i for i in range(10) if i not in KEPT.tolist()])
    gamma = 0.01 * gram[KEPT][:, KEPT].diagonal().mean() * torch.eye(5, dtype=torch.float64)
    expected = weight[:, KEPT] + weight[:, removed] @ gram[removed][:, KEPT] @ torch.linalg.inv(
        gram[KEPT][:, KEPT] + gamma
    )
    torch.testing.assert_close(refit(weight, None, KEPT, moments, damping=0.01)[0], expected)


def test_sequential_is_least_squares_from_pruned_inputs_to_dense_targets():
    x, pruned_x, weight, _ = data()
    y = x @ weight.T
    columns, _ = refit(weight, None, KEPT, moments_of(pruned_x, y), damping=0)
    torch.testing.assert_close(columns, torch.linalg.lstsq(pruned_x[:, KEPT], y).solution.T)


@pytest.mark.parametrize("sequential", [False, True])
def test_with_a_bias_it_is_least_squares_with_an_intercept(sequential):
    x, pruned_x, weight, bias = data()
    y = x @ weight.T + bias
    inputs = pruned_x if sequential else x
    columns, new_bias = refit(weight, bias, KEPT, moments_of(inputs, y), damping=0)
    design = torch.cat([inputs[:, KEPT], torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
    expected = torch.linalg.lstsq(design, y).solution
    torch.testing.assert_close(columns, expected[:-1].T)
    torch.testing.assert_close(new_bias, expected[-1])


def test_damping_shrinks_towards_the_original_weights():
    x, pruned_x, weight, _ = data()
    moments = moments_of(pruned_x, x @ weight.T)
    distances = [
        float((refit(weight, None, KEPT, moments, damping)[0] - weight[:, KEPT]).norm())
        for damping in (0, 0.1, 10, 1e6)
    ]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 1e-4


def test_keeping_all_channels_changes_nothing():
    x, _, weight, bias = data()
    y = x @ weight.T + bias
    columns, new_bias = refit(weight, bias, torch.arange(10), moments_of(x, y), damping=1e-3)
    torch.testing.assert_close(columns, weight)
    torch.testing.assert_close(new_bias, bias)


def test_fewer_samples_than_channels_can_be_solved():
    x, _, weight, _ = data(samples=3)
    columns, _ = refit(weight, None, KEPT, moments_of(x, x @ weight.T), damping=1e-3)
    assert torch.isfinite(columns).all()


def test_mean_bias_is_the_average_output_of_the_removed_channels():
    x, _, weight, bias = data()
    moments = moments_of(x, x @ weight.T)
    removed = [1, 4, 5, 6, 8]
    expected = (x[:, removed] @ weight[:, removed].T).mean(0)
    torch.testing.assert_close(mean_bias(weight, None, KEPT, moments), expected)
    torch.testing.assert_close(mean_bias(weight, bias, KEPT, moments), expected + bias)


@pytest.mark.parametrize("with_bias", [False, True])
def test_without_targets_the_block_s_own_outputs_are_fitted(with_bias):
    x, _, weight, bias = data()
    own = bias if with_bias else None
    collected = moments_of(x, x @ weight.T + bias if with_bias else x @ weight.T)
    inputs_only = Moments(x.shape[1])
    inputs_only.add(x)
    expected, expected_bias = refit(weight, own, KEPT, collected, damping=0.01)
    columns, new_bias = refit(weight, own, KEPT, inputs_only, damping=0.01)
    torch.testing.assert_close(columns, expected)
    if with_bias:
        torch.testing.assert_close(new_bias, expected_bias)
    else:
        assert new_bias is None


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("noise", "samples"), [(0.0, 60), (3.0, 16), (3.0, 400)])
def test_damping_minimizes_the_held_out_error(noise, samples, bias):
    x, pruned_x, weight, own = data(samples=samples + 200)
    own = own if bias else None
    generator = torch.Generator().manual_seed(5)
    y = pruned_x @ weight.T + noise * torch.randn(len(x), 4, generator=generator, dtype=torch.float64)
    fitted, held = (moments_of(pruned_x[part], y[part]) for part in (slice(samples), slice(samples, None)))
    errors = {}
    for gamma in (0.001, 0.01, 0.1, 1.0, 10.0):
        columns, shift = refit(weight, own, KEPT, fitted, gamma)
        missed = y[samples:] - pruned_x[samples:][:, KEPT] @ columns.T - (0 if shift is None else shift)
        errors[gamma] = float(missed.square().sum())
    chosen = choose_damping(weight[:, KEPT], own, fitted.of(KEPT), held.of(KEPT), 0.001)
    assert chosen == pytest.approx(min(errors, key=errors.get))
    if noise and samples < 20:
        assert min(errors, key=errors.get) > 0.01
