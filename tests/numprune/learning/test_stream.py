"""Masks on the residual stream: what they do to a model, to the constraint, and what they learn."""

import dataclasses

import pytest
import torch

from numprune.anatomy import read_anatomy
from numprune.budget import budget_of
from numprune.errors import InputError
from numprune.hidden import outputs_of
from numprune.learning import check_learning, learn, rounding
from numprune.learning.constraint import Constraint, share_of
from numprune.learning.masks import Masked, Masks, fold, masked
from numprune.learning.rounding import cheapest_of, rounded
from numprune.learning.stream import Stream, fold_stream
from numprune.options import options_of
from numprune.planned import check_plan
from numprune.pruning import prune
from numprune.recovery.state import TrainingState
from numprune.slices import Kept
from numprune.target import Target
from tests.conftest import build_tiny
from tests.numprune.learning.test_vib import OPTIONS, ROWS, SELECTION, TOKENS
from tests.numprune.test_hidden import NARROWABLE, coordinates, logits, plan_of, pruned_by, removed, zeroed

AXES = ("kv-groups", "channels", "experts", "hidden-size")
HIDDEN = dataclasses.replace(OPTIONS, axes=("hidden-size",), target=Target(align=8))
BOTH = dataclasses.replace(OPTIONS, axes=AXES, target=Target(align=8))


def build(family="llama", counted="parameters", **overrides):
    """Return a tiny model, its anatomy, layers and masks on all units and coordinates, and a constraint."""
    model = build_tiny(family, **overrides)
    anatomy = read_anatomy(model.config)
    constraint = Constraint(counted, anatomy, 16)
    stream = Stream(anatomy.hidden_size, constraint.of_coordinate, anatomy.blocks)
    units = [Masked(block, constraint.of_unit(block)) for block in anatomy.blocks]
    return model, anatomy, model.get_submodule(anatomy.layers_path), Masks(units, 0, stream), constraint


def draw(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) + 0.5


@pytest.mark.parametrize("family", NARROWABLE)
def test_zero_masks_are_the_cut(family):
    model, anatomy, layers, masks, _ = build(family, rms_norm_eps=1e-6)
    plan = plan_of(anatomy)
    values = masks.indicator(
        {block.name: Kept.whole(torch.arange(block.units), block.members) for block in anatomy.blocks},
        plan.coordinates(),
    )
    with masked(layers, masks, values[None]):
        found = logits(model)
    torch.testing.assert_close(found, logits(pruned_by(model, plan).model), atol=2e-5, rtol=0)
    with zeroed(model, removed(plan.coordinates(), 64)):
        torch.testing.assert_close(found, logits(model), atol=2e-5, rtol=0)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2_moe", "gpt_oss", "granite"])
def test_folded_masks_compute_what_masks_did(family, tied):
    model, anatomy, layers, masks, _ = build(family, tie_word_embeddings=tied, rms_norm_eps=1e-2)
    values = draw(masks.leaves)
    with masked(layers, masks, values[None]):
        wanted = logits(model)
    fold(layers, masks, values)
    fold_stream(model, anatomy, masks.of_stream(values))
    torch.testing.assert_close(logits(model), wanted, atol=1e-4, rtol=0)


def test_each_row_has_masks_of_its_own():
    model, _, layers, masks, _ = build("mixtral")
    values = draw(len(ROWS[:3]), masks.leaves)
    with torch.no_grad(), masked(layers, masks, values):
        together = model(ROWS[:3]).logits
    for row, own in enumerate(values):
        with torch.no_grad(), masked(layers, masks, own[None]):
            torch.testing.assert_close(model(ROWS[row : row + 1]).logits[0], together[row], atol=1e-5, rtol=0)


@pytest.mark.parametrize("counted", ["parameters", "flops"])
@pytest.mark.parametrize("family", ["llama", "qwen2_moe"])
def test_the_kept_share_is_that_of_the_narrow_model(family, counted):
    _, anatomy, _, masks, constraint = build(family, counted)
    kept = {block.name: Kept.whole(torch.arange(max(block.units // 2, 2)), block.members) for block in anatomy.blocks}
    sizes = {name: left.size for name, left in kept.items()}
    with torch.no_grad():
        masks.mean.fill_(1)
        alive = masks.indicator(kept, coordinates(anatomy))
        masks.log_variance.copy_(60 * (0.5 - alive))
        assert float(share_of(constraint, masks).kept(masks)) == pytest.approx(
            1 - constraint.removed(sizes, 40), abs=1e-5
        )
    if counted == "parameters":
        left = budget_of(anatomy.keeping(sizes).narrowed(40)).prunable_parameters
        assert constraint.removed(sizes, 40) == 1 - left / budget_of(anatomy).prunable_parameters


@torch.no_grad()
def plant(model, anatomy, gone):
    """Have nothing read or written in some coordinates."""
    model.model.embed_tokens.weight[:, gone] = 0
    for block in anatomy.blocks:
        layer = model.get_submodule(block.path)
        for parameter, dim in outputs_of(layer, block):
            parameter.index_fill_(dim, gone, 0)
        for name in block.norms:
            layer.get_parameter(name)[gone] = 0


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "tokens"), [("faster", TOKENS), ("fast", TOKENS // 3)])
def test_coordinates_that_nothing_reads_go_first(variant, tokens):
    model = build_tiny()
    anatomy = read_anatomy(model.config)
    keep = coordinates(anatomy, 32)
    plant(model, anatomy, removed(keep, 64))
    options = dataclasses.replace(HIDDEN, ratio=0.5)
    found = learn(model, ROWS, SELECTION, options, variant, tokens, learning_rate=1e-4)
    assert found.plan.hidden.kept == keep.tolist()
    assert all(len(block.kept) == block.units for block in found.plan.blocks.values())
    assert found.record.hidden_size == (32, 64)
    assert found.record.removed == 0.5
    if variant == "faster":
        assert found.record.kept == pytest.approx(0.5, abs=0.02)
        assert found.record.divergence < 1e-5
    source = found.model or model
    check_plan(anatomy, found.plan)
    pruned = prune(source, ROWS[:8], options_of(found.plan), plan=found.plan).model
    with torch.no_grad():
        dense, narrow = (one(SELECTION).logits.log_softmax(-1) for one in (model, pruned))
    assert float((dense.exp() * (dense - narrow)).sum(-1).mean()) == pytest.approx(found.record.divergence, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "counted"),
    [
        (dataclasses.replace(HIDDEN, ratio=0.5), "parameters"),
        # Of four KV groups, the random removal that sets the scale would remove none.
        (dataclasses.replace(OPTIONS, ratio=0.3, seed=2, axes=("kv-groups",)), "kv-bytes"),
    ],
)
def test_the_constraint_has_force_whatever_has_masks(options, counted):
    found = learn(build_tiny(), ROWS, SELECTION, options, "faster", TOKENS * 5 // 2, counted=counted)
    assert found.record.kept == pytest.approx(1 - options.ratio, abs=0.05)


@pytest.mark.parametrize(
    ("allocation", "ratio", "counted"),
    [
        ("error", 0.3, "parameters"),
        ("error", 0.7, "parameters"),
        ("error", 0.4, "flops"),
        ("uniform", 0.3, "parameters"),
    ],
)
def test_units_and_coordinates_meet_the_budget_together(allocation, ratio, counted):
    model = build_tiny(num_key_value_heads=4)
    anatomy = read_anatomy(model.config)
    options = dataclasses.replace(BOTH, ratio=ratio, allocation=allocation)
    found = learn(model, ROWS, SELECTION, options, "faster", TOKENS // 20, counted=counted)
    check_plan(anatomy, found.plan)
    assert ratio <= found.record.removed < ratio + 0.05
    pruned = prune(model, ROWS[:8], options_of(found.plan), plan=found.plan)
    after, hidden = read_anatomy(pruned.model.config), found.record.hidden_size[0]
    assert after.hidden_size == hidden
    assert hidden % 8 == 0
    sizes = {block.name: block.size for block in after.blocks}
    assert Constraint(counted, anatomy, ROWS.shape[1]).removed(sizes, hidden) == pytest.approx(found.record.removed)
    assert (pruned.model.config.model_type in ("llama", "mistral")) == after.is_uniform


def test_rounding_takes_the_cheapest_of_units_and_coordinates():
    """Whatever is planted as worthless goes, so that the budget is met at the least price."""
    _, anatomy, _, masks, constraint = build()
    options = dataclasses.replace(BOTH, ratio=0.25)
    worthless = coordinates(anatomy, 16)
    with torch.no_grad():
        masks.of_stream(masks.log_variance)[worthless] = 20.0
        found = rounded(constraint, masks, options)
    assert found.coordinates.tolist() == removed(worthless, 64).tolist()
    assert found.sizes == {block.name: block.size for block in anatomy.blocks}
    with torch.no_grad():
        masks.log_variance.fill_(-6.0)
        masks.by_block(masks.log_variance)["layers.0.mlp"].fill_(20.0)
        masks.by_block(masks.log_variance)["layers.1.mlp"].fill_(20.0)
        found = rounded(constraint, masks, options)
    assert found.hidden_size == 64
    assert found.sizes["layers.0.mlp"].units < 96


@pytest.mark.parametrize("count", [1, 5, 40, 700])
def test_the_search_finds_the_least_of_prices_that_fall_and_rise(count):
    sizes = [*range(8, 8 * count + 1, 8)]
    for least in (sizes[0], sizes[count // 3], sizes[-1]):
        asked = []

        def price(size, least=least, asked=asked):
            asked.append(size)
            return abs(size - least)

        assert cheapest_of(sizes, price, lambda _: 0.0) == least
        assert len(set(asked)) < 60
        asked.clear()
        assert cheapest_of(sizes, price, lambda size, least=least: abs(size - least) - 10) == least
        assert len(set(asked)) <= 15
    assert cheapest_of(sizes, lambda _: 1.0, lambda _: 0.0) == sizes[-1]


@pytest.mark.parametrize(
    ("allocation", "counted"), [("error", "parameters"), ("error", "flops"), ("uniform", "parameters")]
)
@pytest.mark.parametrize("seed", range(3))
def test_bounds_leave_out_hidden_sizes_without_changing_the_choice(seed, allocation, counted, monkeypatch):
    _, _, _, masks, constraint = build("llama", counted)
    options = dataclasses.replace(BOTH, ratio=0.3, allocation=allocation)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        masks.log_variance.add_(4 * torch.randn(len(masks.mean), generator=draw) + 2)
    found, solved = [], []
    bound, sizes_of = rounding._bound, rounding._sizes

    def counting(narrow, *given):
        solved.append(narrow.anatomy.hidden_size)
        return sizes_of(narrow, *given)

    monkeypatch.setattr(rounding, "_sizes", counting)
    for bounded in (bound, lambda *_: lambda _: 0.0):
        monkeypatch.setattr(rounding, "_bound", bounded)
        choice = rounded(constraint, masks, options)
        found.append((choice.sizes, choice.coordinates.tolist(), len(solved)))
        solved.clear()
    (*ours, few), (*theirs, many) = found
    assert ours == theirs
    assert few <= many
    assert few < many or allocation == "uniform"


def test_a_finished_training_is_read_again(tmp_path):
    options = dataclasses.replace(BOTH, ratio=0.4)
    state = TrainingState(tmp_path / "a", "x")
    model = build_tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wanted = learn(model, ROWS, SELECTION, options, "faster", TOKENS // 20, state=state)
    again = learn(build_tiny(), ROWS, SELECTION, options, "faster", TOKENS // 20, state=state)
    assert again.plan == wanted.plan
    assert again.record.hidden_size == wanted.record.hidden_size
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("family", "options", "counted", "message"),
    [
        ("gpt2", HIDDEN, "parameters", "the hidden size of gpt2 cannot be cut: its layer norms subtract the mean"),
        ("gemma2", HIDDEN, "parameters", "the hidden size of gemma2 cannot be cut: it norms the outputs of its blocks"),
        ("llama", BOTH, "kv-bytes", "axes: the hidden size does not change the KV cache; leave out hidden-size"),
        ("llama", dataclasses.replace(HIDDEN, ratio=0.99), "parameters", "ratio"),
        ("llama", dataclasses.replace(HIDDEN, ratio=0.99), "flops", "ratio is"),
        (
            "llama",
            dataclasses.replace(HIDDEN, ratio=0, target=Target(align=128)),
            "parameters",
            "nothing may be pruned",
        ),
    ],
)
def test_what_masks_cannot_learn_is_refused_before_any_work(family, options, counted, message):
    with pytest.raises(InputError, match=message):
        check_learning(read_anatomy(build_tiny(family).config), options, counted, 16)
