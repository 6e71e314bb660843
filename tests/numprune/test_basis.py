"""What the residual stream is measured by, and what is chosen from it."""

import itertools

import pytest
import torch

from numprune import basis
from numprune.basis import StreamMoments
from numprune.export.streaming import CheckpointLayers
from numprune.layers import CopiedLayers
from numprune.tasks.language import drawn_nll
from tests.conftest import build_tiny, write_checkpoint
from tests.numprune.test_hidden import ROWS

DRAW = torch.Generator().manual_seed(5)


def positive(size=6):
    root = torch.randn(size, size, generator=DRAW, dtype=torch.float64)
    return root @ root.T


def moments_of(points=3):
    return StreamMoments([positive() for _ in range(points)], [positive() for _ in range(points)])


def measured_directly(model, rows, first):
    """States and gradients in front of every norm that reads the stream, by one backward pass of the whole model."""
    model = model.requires_grad_(True)
    names = [name for name, _ in model.named_modules() if name.endswith("norm")]
    names = [*(name for name in names if "layers" in name), "model.norm"]
    seen = {}

    def keep(name):
        def hook(_, args):
            args[0].retain_grad()
            seen[name] = args[0]

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in names]
    draw = torch.Generator().manual_seed(0)
    states, gradients = ([torch.zeros(64, 64) for _ in names] for _ in range(2))
    for row in rows.split(1):
        drawn_nll(model(row).logits, draw).backward()
        for point, name in enumerate(names):
            for total, values in ((states, seen[name]), (gradients, seen[name].grad)):
                flat = values.detach()[0, first:]
                total[point] += flat.T @ flat / (len(rows) * (rows.shape[1] - first))
    for handle in handles:
        handle.remove()
    return states, gradients


@pytest.mark.parametrize("first", [0, 1])
def test_moments_are_those_of_one_backward_pass(first):
    model = build_tiny()
    found = basis.measure(CopiedLayers(model), ROWS, 3, first=first)
    states, gradients = measured_directly(model, ROWS, first)
    assert len(found.states) == len(states) == 2 * 2 + 1
    for ours, theirs in (*zip(found.states, states, strict=True), *zip(found.gradients, gradients, strict=True)):
        torch.testing.assert_close(ours, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=1e-4)


def test_a_streamed_model_is_measured_alike(tmp_path):
    model = build_tiny("qwen3_moe")
    folder = write_checkpoint(model, tmp_path / "base")
    inside = basis.measure(CopiedLayers(model), ROWS)
    streamed = basis.measure(CheckpointLayers(folder, scratch=tmp_path), ROWS)
    for ours, theirs in zip((*inside.states, *inside.gradients), (*streamed.states, *streamed.gradients), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5 * float(ours.abs().max()), rtol=1e-4)


def test_the_price_is_that_of_the_projected_states():
    """1/2 E[(g . e)^2] for states and gradients independent of each other, e what is removed of the state."""
    moments = moments_of()
    removed = torch.linalg.qr(torch.randn(6, 2, generator=DRAW, dtype=torch.float64)).Q
    projector = removed @ removed.T
    pairs = zip(moments.states, moments.gradients, strict=True)
    wanted = sum(float((projector @ state @ projector @ gradient).trace()) for state, gradient in pairs) / 2
    assert basis.loss(moments, removed) == pytest.approx(wanted, rel=1e-12)


def test_fisher_is_orthogonal_and_the_cheapest_of_its_taus():
    moments = moments_of()
    chosen = basis.choose(moments, 4, "fisher")
    rotation = chosen.rotation
    torch.testing.assert_close(rotation.T @ rotation, torch.eye(6, dtype=torch.float64), atol=1e-10, rtol=0)
    states, gradients = (sum(part) for part in (moments.states, moments.gradients))
    tried = []
    for tau in basis.TAUS:
        surrogate = tau * states / states.trace() + gradients / (tau * gradients.trace())
        tried.append(basis.loss(moments, torch.linalg.eigh(surrogate).eigenvectors[:, :2]))
    assert basis.loss(moments, rotation[:, 4:]) == pytest.approx(min(tried), rel=1e-9)
    assert chosen.kept.tolist() == [0, 1, 2, 3]


def test_fisher_removes_what_the_loss_does_not_depend_on_however_large():
    turn = torch.linalg.qr(torch.randn(6, 6, generator=DRAW, dtype=torch.float64)).Q
    state = turn @ torch.diag(torch.tensor([1.0, 1, 1, 1, 50, 50]).double()) @ turn.T
    gradient = turn @ torch.diag(torch.tensor([1.0, 1, 1, 1, 0, 0]).double()) @ turn.T
    moments = StreamMoments([state], [gradient])
    removed = basis.choose(moments, 4, "fisher").rotation[:, 4:]
    assert basis.loss(moments, removed) < 1e-12
    largest = basis.principal_axes(state)
    assert basis.loss(moments, largest[:, 4:]) > 0.5


def test_coordinates_are_removed_one_by_one_where_the_price_rises_least():
    moments = moments_of()
    every, gone = torch.eye(6, dtype=torch.float64), []
    for size in (5, 4, 3):
        prices = {one: basis.loss(moments, every[:, [*gone, one]]) for one in range(6) if one not in gone}
        gone.append(min(prices, key=prices.__getitem__))
        kept = basis.choose(moments, size, "coordinates")
        assert kept.kept.tolist() == [one for one in range(6) if one not in gone]
        assert kept.rotation is None
    first = min(itertools.combinations(range(6), 1), key=lambda some: basis.loss(moments, every[:, [*some]]))
    assert first == (gone[0],)


def test_outliers_at_first_tokens_do_not_count():
    model, rows = build_tiny(), ROWS.clone()
    rows[:, 0] = 258
    with torch.no_grad():
        model.model.embed_tokens.weight[258] *= 1000
    without, with_first = (basis.measure(CopiedLayers(model), rows, first=first) for first in (1, 0))
    assert with_first.states[0].trace() > 1000 * without.states[0].trace()
    assert not torch.equal(*(basis.choose(found, 32, "coordinates").kept for found in (without, with_first)))
    model.model.embed_tokens.weight.data[258] /= 1000
    usual = basis.measure(CopiedLayers(model), rows)
    torch.testing.assert_close(without.states[0], usual.states[0])


def test_a_rotation_costs_less_than_coordinates():
    moments = basis.measure(CopiedLayers(build_tiny()), ROWS)
    kept = basis.choose(moments, 48, "coordinates").kept
    gone = [one for one in range(64) if one not in kept.tolist()]
    rotated = basis.loss(moments, basis.choose(moments, 48, "fisher").rotation[:, 48:])
    assert rotated < 0.8 * basis.loss(moments, torch.eye(64, dtype=torch.float64)[:, gone])
