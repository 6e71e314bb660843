"""Greedy removal in panels against the docstring's formulas, one update at a time."""

import importlib
import itertools

import numpy as np
import pytest
import torch

from numprune.criteria.obs import greedy_members, greedy_removal
from numprune.linalg import damped
from numprune.slices import Size
from tests.numprune.test_criteria import problem

MODULE = importlib.import_module("numprune.criteria.obs")  # the package has a function of that name


def one_by_one(weight, gram, c, damping):
    """Order and costs with W and Q updated whole after every removal."""
    units = weight.shape[1] // c
    weight = weight.clone()
    inverse = torch.linalg.inv(damped(gram, damping))
    removed, order, costs = torch.zeros(units, dtype=torch.bool), [], []
    for _ in range(units):
        q = torch.stack([inverse[u * c : u * c + c, u * c : u * c + c] for u in range(units)])
        w = torch.stack([weight[:, u * c : u * c + c].T for u in range(units)])
        q[removed] = torch.eye(c, dtype=q.dtype)
        cost = (w * torch.linalg.solve(q, w)).sum((1, 2)).masked_fill(removed, torch.inf)
        best = int(cost.argmin())
        g = slice(best * c, best * c + c)
        rows = torch.linalg.solve(inverse[g, g], inverse[g])
        weight, inverse = weight - weight[:, g] @ rows, inverse - inverse[:, g] @ rows
        removed[best] = True
        order.append(best)
        costs.append(float(cost[best]))
    return order, costs


def assert_same(weight, gram, c, damping=1e-4, rtol=1e-8, **options):
    order, costs = greedy_removal(weight, gram, c, damping, **options)
    expected_order, expected_costs = one_by_one(weight, gram, c, damping)
    n = len(order)
    assert order.tolist() == expected_order[:n]
    np.testing.assert_allclose(costs.numpy(), expected_costs[:n], rtol=rtol)


def moments(x):
    return x.T @ x / len(x)


@pytest.mark.slow
# 150 channels make more than one panel of 128 and cross the point where what was removed is dropped.
@pytest.mark.parametrize("c", [1, 2, 6, 150])
@pytest.mark.parametrize("samples", [400, 60])
def test_panels_do_not_change_the_result(c, samples):
    weight, x = problem(seed=c, out=40, channels=150, samples=samples)
    assert_same(weight, moments(x), c)


@pytest.mark.parametrize("panel", [1, 7, 30])
@pytest.mark.parametrize("compact", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("c", [1, 3])
def test_panel_width_and_compaction_do_not_change_the_result(monkeypatch, panel, compact, c):
    monkeypatch.setattr(MODULE, "_PANEL", panel)
    monkeypatch.setattr(MODULE, "_COMPACT", compact)
    weight, x = problem(out=9, channels=60, samples=40)
    assert_same(weight, moments(x), c)


@pytest.mark.parametrize("stop", [0, 1, 20, 60, 99])
@pytest.mark.parametrize("c", [1, 2])
def test_stopping_early_removes_the_same_units(monkeypatch, stop, c):
    monkeypatch.setattr(MODULE, "_PANEL", 16)
    weight, x = problem(out=9, channels=60)
    assert len(greedy_removal(weight, moments(x), c, stop=stop)[0]) == min(stop, 60 // c)
    assert_same(weight, moments(x), c, stop=stop)


@pytest.mark.parametrize("c", [1, 2])
def test_dead_channels_go_first_at_negligible_cost(c):
    weight, x = problem(out=9, channels=160, samples=500)
    x[:, 20:24] = 0
    weight[:, 40:44] = 0  # read by nobody: what is removed before may give it a weight
    order, costs = greedy_removal(weight, moments(x), c)
    assert set(order[: 8 // c].tolist()) == {unit for start in (20, 40) for unit in range(start // c, (start + 4) // c)}
    energy = (weight @ moments(x) * weight).sum()
    assert float(costs[: 8 // c].sum()) < 1e-3 * float(energy)
    assert float(costs[: 4 // c].max()) == 0


@pytest.mark.parametrize("c", [1, 4])
def test_dead_blocks_and_zero_weights_are_ordered(c):
    weight, x = problem(channels=160)
    for W, G in ((weight, torch.zeros(160, 160).double()), (torch.zeros_like(weight), moments(x))):
        order, costs = greedy_removal(W, G, c)
        assert sorted(order.tolist()) == list(range(160 // c))
        assert torch.isfinite(costs).all()
        assert costs.min() >= 0


@pytest.mark.parametrize("c", [1, 2])
def test_ties_remove_the_first_unit_first(c):
    order, costs = greedy_removal(torch.ones(3, 160).double(), torch.eye(160).double(), c, damping=1.0)
    assert order.tolist() == list(range(160 // c))
    torch.testing.assert_close(costs, torch.full((160 // c,), 6.0 * c).double())


def test_one_of_two_twins_is_nearly_free_and_the_other_takes_its_weight():
    weight, x = problem(out=9, channels=80, samples=500)
    x, weight = torch.cat([x, x], 1), torch.cat([weight, weight], 1)
    order, costs = greedy_removal(weight, moments(x), 1, damping=1e-6)
    assert sorted(unit % 80 for unit in order[:80].tolist()) == list(range(80))
    _, alone = greedy_removal(2 * weight[:, :80], moments(x[:, :80]), 1, damping=1e-6)
    np.testing.assert_allclose(costs[80:].numpy(), alone.numpy(), rtol=1e-3)
    assert float(costs[:80].sum()) < 1e-4 * float(costs.sum())


@pytest.mark.parametrize(
    ("c", "samples", "scale", "damping"),
    [
        *itertools.product([1, 4], [30, 3000], [1.0, 1e4], [1e-4]),
        *itertools.product([1, 4], [30], [1e6], [1e-4, 1e-9]),  # cancellation takes all that float64 has
    ],
)
def test_costs_are_finite_and_nonnegative_despite_rounding(c, samples, scale, damping):
    weight, x = problem(out=9, channels=160, samples=samples)
    x[:, 5] *= scale  # a massive activation, as trained models have them
    x[:, 9] = x[:, 5]
    x[:, 11] = 0
    order, costs = greedy_removal(weight, moments(x), c, damping)
    assert sorted(order.tolist()) == list(range(160 // c))
    assert torch.isfinite(costs).all()
    assert costs.min() >= 0


@pytest.mark.parametrize("c", [1, 4])
def test_costs_sum_to_the_error_of_the_refitted_weight(c):
    """Against least squares on what is left, which knows nothing of the updates; a massive activation and all."""
    weight, x = problem(out=9, channels=160, samples=90)
    x[:, 5] *= 1e4
    gram = damped(moments(x), 1e-4)
    order, costs = greedy_removal(weight, moments(x), c)
    total = 0
    for n in (40, 120, 156):
        kept = [unit * c + j for unit in sorted(order[n // c :].tolist()) for j in range(c)]
        error = weight.clone()
        error[:, kept] -= torch.linalg.solve(gram[kept][:, kept], gram[kept] @ weight.T).T
        assert float(costs[: n // c].sum()) == pytest.approx(float((error @ gram * error).sum()), rel=1e-6)
        assert float(costs[: n // c].sum()) > total
        total = float(costs[: n // c].sum())


def test_an_invalid_gram_matrix_is_refused():
    weight, x = problem()
    with pytest.raises(ValueError, match="not finite"):
        greedy_removal(weight, moments(x) * torch.nan, 1)
    with pytest.raises(ValueError, match="not positive definite"):
        greedy_removal(weight, -moments(x), 1)


def error_of(weight, gram, kept):
    """E||dy||^2, and the ridge's part, once only the channels `kept` are there and were refitted."""
    moments = damped(gram, 1e-4)
    refitted = torch.zeros_like(weight)
    refitted[:, kept] = weight @ moments[:, kept] @ torch.linalg.inv(moments[kept][:, kept])
    missing = weight - refitted
    return float(torch.einsum("oi,ij,oj->", missing, moments, missing))


@pytest.mark.parametrize("units", [[0, 1, 2, 3], [1, 3]])
def test_each_round_removes_the_cheapest_member_of_every_unit(units):
    """Against every choice there is, refitted from the start each time."""
    weight, x = problem(out=9, channels=24, samples=80)
    size, c = Size(4, 3), 2
    order, costs = greedy_members(weight, moments(x), torch.tensor(units), size)
    left = {unit: [0, 1, 2] for unit in units}

    def error(members):
        kept = [(unit * 3 + member) * c + channel for unit in units for member in members[unit] for channel in range(c)]
        return error_of(weight, moments(x), kept)

    for number in range(2):
        start, waiting = error(left), list(units)
        while waiting:
            found = {
                (unit, member): error(left | {unit: [other for other in left[unit] if other != member]})
                for unit in waiting
                for member in left[unit]
            }
            unit, member = min(found, key=found.__getitem__)
            assert int(order[number, units.index(unit)]) == member
            waiting.remove(unit)
            left[unit] = [other for other in left[unit] if other != member]
        assert float(costs[number]) == pytest.approx(error(left) - start, rel=1e-6)


def test_dead_members_go_first():
    weight, x = problem(out=9, channels=24, samples=80)
    x = x.view(-1, 4, 3, 2)
    x[:, range(4), [0, 2, 1, 0]] = 0
    gram = moments(x.flatten(1))
    order, costs = greedy_members(weight, gram, torch.arange(4), Size(4, 3))
    assert order[0].tolist() == [0, 2, 1, 0]
    ridge = 1e-4 * float(gram.diagonal().mean() * weight.square().sum())
    assert 0 <= float(costs[0]) <= ridge
