"""Each score against its formula, or against an independent solver."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import Bounds, LinearConstraint, minimize

from numprune.criteria import CRITERIA, BlockView, member_scores
from numprune.criteria.numerical import boxed_mask, error_matrix, relaxed_mask
from numprune.criteria.obs import greedy_members, greedy_removal
from numprune.slices import Size


def problem(seed=0, out=6, channels=12, samples=60, mean=0.5):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(channels, channels, generator=generator, dtype=torch.float64)
    x = torch.randn(samples, channels, generator=generator, dtype=torch.float64) @ mixing + mean
    weight = torch.randn(out, channels, generator=generator, dtype=torch.float64)
    return weight, x


def view(weight, x, channels_per_unit=1, ratio=0.3, seed=0, members=1):
    taylor, dimap = torch.rand(2, x.shape[1] // channels_per_unit, members)
    gram, mean = x.T @ x / len(x), x.mean(0)
    return BlockView(weight, gram, mean, channels_per_unit, ratio, seed, taylor, members, dimap=dimap)


def paper_newton(A, ratio, penalty, iterations=50):
    """Algorithm 1: Newton's iteration on L from z = 1, gradient and Hessian as printed."""
    D = len(A)
    ones = torch.ones(D, dtype=A.dtype)
    z = ones.clone()
    for _ in range(iterations):
        gradient = A @ (z - 1) + penalty * (z.sum() - (1 - ratio) * D) * ones
        hessian = A + penalty * torch.outer(ones, ones)
        z = z - torch.linalg.solve(hessian, gradient)
    return z


@pytest.mark.parametrize("penalty", [0.1, 10.0, 1e4])
def test_closed_form_matches_the_paper_s_newton_iteration_at_convergence(penalty):
    weight, x = problem()
    A = error_matrix(weight, x.T @ x / len(x))
    torch.testing.assert_close(
        relaxed_mask(A, 0.3, penalty, ridge=0), paper_newton(A, 0.3, penalty), atol=1e-8, rtol=1e-8
    )


@pytest.mark.parametrize("penalty", [0.1, 10.0, math.inf])
def test_closed_form_matches_a_general_solver(penalty):
    weight, x = problem()
    A = error_matrix(weight, x.T @ x / len(x)).numpy()
    A = A / A.diagonal().mean()
    r = 0.7 * len(A)

    def loss(z):
        value = 0.5 * (1 - z) @ A @ (1 - z)
        return value if math.isinf(penalty) else value + 0.5 * penalty * (z.sum() - r) ** 2

    def gradient(z):
        value = A @ (z - 1)
        return value if math.isinf(penalty) else value + penalty * (z.sum() - r)

    constraints = [LinearConstraint(np.ones(len(A)), r, r)] if math.isinf(penalty) else []
    found = minimize(
        loss,
        np.ones(len(A)),
        jac=gradient,
        method="SLSQP",
        constraints=constraints,
        options={"ftol": 1e-15, "maxiter": 2000},
    )
    mask = relaxed_mask(torch.tensor(A), 0.3, penalty, ridge=0)
    assert loss(mask.numpy()) <= found.fun + 1e-9
    np.testing.assert_allclose(mask.numpy(), found.x, atol=1e-4)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9])
def test_boxed_mask_matches_a_general_solver(seed, ratio):
    weight, x = problem(seed, out=2)
    A = error_matrix(weight, x.T @ x / len(x)).numpy()
    A = A / A.diagonal().mean() + 1e-8 * np.eye(len(A))
    D = len(A)

    def loss(z):
        return 0.5 * (1 - z) @ A @ (1 - z)

    found = minimize(
        loss,
        np.full(D, 1 - ratio),
        jac=lambda z: A @ (z - 1),
        method="SLSQP",
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(np.ones(D), (1 - ratio) * D, (1 - ratio) * D)],
        options={"ftol": 1e-15, "maxiter": 2000},
    )
    mask = boxed_mask(torch.tensor(A), ratio, ridge=0).numpy()
    assert mask.min() >= 0
    assert mask.max() <= 1
    assert mask.sum() == pytest.approx((1 - ratio) * D)
    # Not `found.success`: at this tolerance the solver's line search gives up at the optimum on some machines.
    assert loss(mask) <= loss(found.x) + 1e-9
    np.testing.assert_allclose(mask, found.x, atol=1e-3)


def test_unconstrained_mask_leaves_the_box_and_the_boxed_one_does_not():
    weight, x = problem(3, out=2)
    A = error_matrix(weight, x.T @ x / len(x))
    unconstrained = relaxed_mask(A, 0.5)
    assert unconstrained.max() > 1
    assert not torch.allclose(unconstrained, boxed_mask(A, 0.5), atol=1e-3)


def test_ranking_of_the_numerical_score_depends_on_neither_ratio_nor_penalty():
    weight, x = problem()
    A = error_matrix(weight, x.T @ x / len(x))
    orders = {
        tuple(relaxed_mask(A, ratio, penalty).argsort().tolist()) for ratio in (0.1, 0.7) for penalty in (1.0, math.inf)
    }
    assert len(orders) == 1


def test_error_matrix_gives_the_error_of_a_masked_input():
    weight, x = problem()
    A = error_matrix(weight, x.T @ x / len(x))
    z = torch.rand(12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = ((x - x * z) @ weight.T).square().sum(1).mean()
    torch.testing.assert_close((1 - z) @ A @ (1 - z), expected)


def brute_force_greedy(weight, gram, c, damping):
    """Greedy removal where every candidate's loss comes from its own damped least-squares refit from scratch."""
    D = weight.shape[1]
    damped = gram + damping * gram.diagonal().mean() * torch.eye(D, dtype=gram.dtype)
    alive = list(range(D // c))
    order, totals = [], []
    while alive:
        losses = {}
        for unit in alive:
            kept = [u * c + j for u in alive if u != unit for j in range(c)]
            refitted = torch.zeros_like(weight)
            if kept:
                refitted[:, kept] = torch.linalg.solve(damped[kept][:, kept], damped[kept] @ weight.T).T
            error = weight - refitted
            losses[unit] = float(torch.einsum("od,de,oe->", error, damped, error))
        best = min(losses, key=losses.__getitem__)
        order.append(best)
        totals.append(losses[best])
        alive.remove(best)
    return order, totals


@pytest.mark.parametrize("c", [1, 2, 3])
def test_greedy_obs_matches_brute_force(c):
    weight, x = problem(seed=c)
    gram = x.T @ x / len(x)
    order, costs = greedy_removal(weight, gram, c, damping=1e-2)
    expected_order, expected_totals = brute_force_greedy(weight, gram, c, damping=1e-2)
    assert order.tolist() == expected_order
    np.testing.assert_allclose(costs.cumsum(0).numpy(), expected_totals, rtol=1e-8)


def test_obs_score_ascends_in_the_order_of_removal_and_ends_at_all_the_energy():
    weight, x = problem()
    seen = view(weight, x, channels_per_unit=2)
    order, _ = greedy_removal(weight, seen.gram, 2)
    scores = CRITERIA["obs"](seen)
    assert scores.argsort().tolist() == order.tolist()
    assert float(scores.max()) == pytest.approx(1, abs=1e-2)


def test_obs_survives_dead_channels_and_too_few_samples():
    weight, x = problem(channels=12, samples=5)
    x[:, 3] = 0
    scores = CRITERIA["obs"](view(weight, x))
    assert torch.isfinite(scores).all()
    assert scores[3] < 1e-3


def test_simple_scores_match_their_formulas():
    weight, x = problem()
    seen = view(weight, x, channels_per_unit=3)
    norms = [math.sqrt(sum(w * w for w in weight[:, j].tolist())) for j in range(12)]
    rms = [math.sqrt(sum(v * v for v in x[:, j].tolist()) / len(x)) for j in range(12)]
    variance = [float(np.var(x[:, j].numpy())) for j in range(12)]
    flap = np.array([variance[j] * norms[j] ** 2 for j in range(12)])
    flap = (flap - flap.mean()) / flap.std(ddof=1)

    def units(values):
        return np.asarray(values).reshape(4, 3).mean(1)

    np.testing.assert_allclose(CRITERIA["magnitude"](seen).numpy(), units(norms))
    np.testing.assert_allclose(CRITERIA["wanda"](seen).numpy(), units(np.array(norms) * np.array(rms)))
    np.testing.assert_allclose(CRITERIA["flap"](seen).numpy(), units(flap))


def test_random_is_seeded_per_block():
    weight, x = problem()
    first, again, other = (CRITERIA["random"](view(weight, x, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize("channels_per_unit", [1, 4])
def test_every_criterion_gives_a_finite_score_even_for_a_dead_block(name, channels_per_unit):
    weight, x = problem()
    for inputs in (x, torch.zeros_like(x)):
        scores = CRITERIA[name](view(weight, inputs, channels_per_unit))
        assert scores.shape == (12 // channels_per_unit,)
        assert torch.isfinite(scores).all()


@pytest.mark.parametrize("name", CRITERIA)
def test_every_criterion_scores_the_members_of_the_remaining_units(name):
    weight, x = problem()
    seen, units = view(weight, x, channels_per_unit=6, members=3), torch.tensor([1])
    scores = member_scores(name, seen, units)
    assert scores.shape == (1, 3)
    assert torch.isfinite(scores).all()
    if name == "obs":
        order, _ = greedy_members(seen.weight, seen.gram, units, Size(2, 3))
        assert scores.argsort().tolist() == [[*order[:, 0].tolist(), int(scores.argmax())]]
    elif name in ("taylor", "dimap"):
        assert torch.equal(scores, getattr(seen, name)[units])
    else:
        assert torch.equal(scores[0], CRITERIA[name](view(weight, x, channels_per_unit=2))[3:])
