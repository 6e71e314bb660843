"""Error curves against the loss that they estimate."""

import itertools

import torch

from numprune.criteria.obs import greedy_members, greedy_removal
from numprune.curves import error_curve
from numprune.slices import Size


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


def test_the_first_removal_is_the_cheapest_and_costs_its_loss():
    x, weight, S = block()
    curve = error_curve(weight, x.T @ x / len(x), S, Size(6)).flatten()
    singles = [loss(x, weight, S, [j for j in range(6) if j != gone]) for gone in range(6)]
    assert curve[0] == 0
    torch.testing.assert_close(float(curve[1]), min(singles), rtol=5e-3, atol=0)


def test_a_curve_never_decreases_and_ends_with_the_whole_block():
    x, weight, S = block()
    for c in (1, 2, 3):
        curve = error_curve(weight, x.T @ x / len(x), S, Size(6 // c)).flatten()
        assert len(curve) == 6 // c + 1
        assert all(b >= a for a, b in itertools.pairwise(curve.tolist()))
        y = x @ weight.T
        everything = float(torch.einsum("ni,ij,nj->", y, S, y) / len(x) / 2)
        torch.testing.assert_close(float(curve[-1]), everything, rtol=1e-2, atol=0)


def test_units_that_do_not_affect_the_loss_cost_nothing():
    x, weight, S = block()
    assert float(error_curve(weight, x.T @ x / len(x), torch.zeros_like(S), Size(6)).max()) < 1e-6
    scaled = error_curve(weight, x.T @ x / len(x), 4 * S, Size(6))
    torch.testing.assert_close(scaled, 4 * error_curve(weight, x.T @ x / len(x), S, Size(6)))


def test_members_cost_their_loss_after_earlier_removals():
    """Three units of four members; the members that the curve stands for are those that `greedy_members` removes."""
    x, weight, S = block(channels=12)
    size, gram = Size(3, 4), x.T @ x / len(x)
    curve = error_curve(weight, gram, S, size, members=True)
    assert curve.shape == (4, 4)
    torch.testing.assert_close(curve[:, :1], error_curve(weight, gram, S, size))
    stopped = error_curve(weight, gram, S, size, fewest=2, members=True)
    torch.testing.assert_close(stopped[:2], curve[:2])
    assert torch.isinf(stopped[2:]).all()
    assert (curve.diff(dim=0) >= 0).all()
    assert (curve.diff(dim=1) >= 0).all()
    priced = torch.linalg.cholesky(S).T @ weight
    order, _ = greedy_removal(priced, gram, 4)
    for gone in range(3):
        units = order[gone:].sort().values
        removed, _ = greedy_members(priced, gram, units, size)
        for rounds in range(1, 4):
            kept = [
                int(unit) * 4 + member
                for position, unit in enumerate(units)
                for member in range(4)
                if member not in removed[:rounds, position].tolist()
            ]
            torch.testing.assert_close(float(curve[gone, rounds]), loss(x, weight, S, kept), rtol=1e-2, atol=0)
