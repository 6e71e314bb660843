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
            scale = seen[name].detach().square().mean(-1, keepdim=True).sqrt()
            for total, values in ((states, seen[name] / scale), (gradients, seen[name].grad * scale)):
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


def price(moments, removed):
    """1/2 tr(U^T C U U^T F U), summed."""
    projector = removed @ removed.T
    pairs = zip(moments.states, moments.gradients, strict=True)
    return (
        sum(float((projector @ state.double() @ projector @ gradient.double()).trace()) for state, gradient in pairs)
        / 2
    )


def lost(state, gradient, kept):
    """tr(F E[e e^T]), e what the best linear prediction of x from K^T x leaves."""
    left = state - state @ kept @ torch.linalg.solve(kept.T @ state @ kept, kept.T @ state)
    return float((gradient @ left).trace())


def test_fisher_is_orthogonal_and_loses_least():
    """The loss is the sum of the smallest eigenvalues of C F, and no rotation has less."""
    moments = moments_of()
    chosen = basis.choose(moments, 4, "fisher")
    rotation = chosen.rotation
    torch.testing.assert_close(rotation.T @ rotation, torch.eye(6, dtype=torch.float64), atol=1e-10, rtol=0)
    assert chosen.kept.tolist() == [0, 1, 2, 3]
    state, gradient = (sum(part) for part in (moments.states, moments.gradients))
    least = lost(state, gradient, rotation[:, :4])
    values = torch.linalg.eigvals(state @ gradient).real.sort().values
    assert least == pytest.approx(float(values[:2].sum()), rel=1e-3)
    for _ in range(50):
        other = torch.linalg.qr(torch.randn(6, 4, generator=DRAW, dtype=torch.float64)).Q
        assert lost(state, gradient, other) > least
    assert lost(state, gradient, basis.principal_axes(state)[:, :4]) > least


def test_fisher_removes_what_the_loss_does_not_depend_on_however_large():
    turn = torch.linalg.qr(torch.randn(6, 6, generator=DRAW, dtype=torch.float64)).Q
    state = turn @ torch.diag(torch.tensor([1.0, 1, 1, 1, 50, 50]).double()) @ turn.T
    gradient = turn @ torch.diag(torch.tensor([1.0, 1, 1, 1, 0, 0]).double()) @ turn.T
    removed = basis.choose(StreamMoments([state], [gradient]), 4, "fisher").rotation[:, 4:]
    torch.testing.assert_close(removed @ removed.T, turn[:, 4:] @ turn[:, 4:].T, atol=1e-6, rtol=0)


def test_coordinates_are_removed_one_by_one_where_the_price_rises_least():
    moments = moments_of()
    every, gone = torch.eye(6, dtype=torch.float64), []
    for size in (5, 4, 3):
        prices = {one: price(moments, every[:, [*gone, one]]) for one in range(6) if one not in gone}
        gone.append(min(prices, key=prices.__getitem__))
        kept = basis.choose(moments, size, "coordinates")
        assert kept.kept.tolist() == [one for one in range(6) if one not in gone]
        assert kept.rotation is None
    first = min(itertools.combinations(range(6), 1), key=lambda some: price(moments, every[:, [*some]]))
    assert first == (gone[0],)


def test_outliers_at_first_tokens_do_not_count():
    model, rows = build_tiny(), ROWS.clone()
    rows[:, 0] = 258
    usual = basis.measure(CopiedLayers(model), rows)
    with torch.no_grad():
        model.model.embed_tokens.weight[258] *= 1000
    without, with_first = (basis.measure(CopiedLayers(model), rows, first=first) for first in (1, 0))
    torch.testing.assert_close(without.states[0], usual.states[0])
    count = rows.shape[1]
    direction = torch.nn.functional.rms_norm(model.model.embed_tokens.weight[258].detach(), (64,))
    only_first = with_first.states[0] - without.states[0] * (count - 1) / count
    torch.testing.assert_close(only_first, torch.outer(direction, direction) / count, atol=1e-4, rtol=1e-3)
