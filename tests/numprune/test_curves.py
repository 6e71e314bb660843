"""A curve against the loss that it stands for."""

import itertools

import torch

from numprune.curves import error_curve


def block(channels=6, out=4, samples=64):
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(channels, channels, generator=generator, dtype=torch.float64)
    x = torch.randn(samples, channels, generator=generator, dtype=torch.float64) @ mixing
    weight = torch.randn(out, channels, generator=generator, dtype=torch.float64)
    gradients = torch.randn(200, out, generator=generator, dtype=torch.float64) * torch.tensor([3.0, 1.0, 0.3, 0.1])
    return x, weight, gradients.T @ gradients / len(gradients)


def loss(x, weight, S, kept):
    """1/2 E[dy^T S dy] after least squares on the kept channels."""
    y = x @ weight.T
    dy = y - x[:, kept] @ torch.linalg.lstsq(x[:, kept], y).solution
    return float(torch.einsum("ni,ij,nj->", dy, S, dy) / len(x) / 2)


def test_the_first_removal_is_the_cheapest_of_all_and_costs_what_the_loss_says():
    x, weight, S = block()
    curve = error_curve(weight, x.T @ x / len(x), S, 1)
    singles = [loss(x, weight, S, [j for j in range(6) if j != gone]) for gone in range(6)]
    assert curve[0] == 0
    torch.testing.assert_close(float(curve[1]), min(singles), rtol=5e-3, atol=0)


def test_a_curve_never_falls_and_ends_with_the_whole_block():
    x, weight, S = block()
    for c in (1, 2, 3):
        curve = error_curve(weight, x.T @ x / len(x), S, c)
        assert len(curve) == 6 // c + 1
        assert all(b >= a for a, b in itertools.pairwise(curve.tolist()))
        y = x @ weight.T
        everything = float(torch.einsum("ni,ij,nj->", y, S, y) / len(x) / 2)
        torch.testing.assert_close(float(curve[-1]), everything, rtol=1e-2, atol=0)


def test_what_the_loss_does_not_mind_costs_nothing():
    x, weight, S = block()
    assert float(error_curve(weight, x.T @ x / len(x), torch.zeros_like(S), 1).max()) < 1e-6
    scaled = error_curve(weight, x.T @ x / len(x), 4 * S, 1)
    torch.testing.assert_close(scaled, 4 * error_curve(weight, x.T @ x / len(x), S, 1))
