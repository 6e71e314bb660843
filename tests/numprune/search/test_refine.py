"""Refining the plan of a real model: what is measured is what is pruned, and the model stays as it is."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from numprune.byte_budget import ByteBudget
from numprune.calibration import Walker
from numprune.choosing import Known
from numprune.errors import InputError
from numprune.layers import CopiedLayers, ModelLayers
from numprune.option_checks import check_options
from numprune.options import PruneOptions, options_of
from numprune.planned import check_plan
from numprune.plans import read_plan
from numprune.pruning import dense_moments, plan_layers, prune, prune_layers, what_to_drop
from numprune.quantization.allocation import Form
from numprune.search import divergence
from numprune.search.divergence import Divergences
from numprune.search.levels import Levels
from numprune.search.refine import MINIMUM_ROWS, parts
from numprune.slices import GONE, Size
from numprune.target import Target
from numprune.tasks import CAUSAL
from numprune.tasks.embedding import Embedding
from numprune.tasks.masked import masked_lm
from tests.conftest import build_tiny, encoder_tokenizer

ROWS = torch.randint(0, 250, (24, 16), generator=torch.Generator().manual_seed(0))
# Twelve rows are compared, and twelve others confirm.
SEARCHED = PruneOptions(0.45, allocation="error", compensation="oneshot", target=Target(align=4), refine="search")
PLAIN = replace(SEARCHED, refine="none")


def build(family="llama", **overrides):
    return build_tiny(family, **{"num_hidden_layers": 3, **overrides})


@torch.no_grad()
def kl(dense, other, rows, task=CAUSAL):
    """Mean divergence of each row, by the models' own forward passes."""
    outputs = [task.output(one, rows, torch.ones_like(rows)) for one in (dense, other)]
    found = task.divergence(outputs[1], outputs[0], rows)
    return found.view(len(rows), -1).mean(1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "task"),
    [
        ("llama", CAUSAL),
        ("gpt2", CAUSAL),
        ("gemma2", CAUSAL),
        ("bert", masked_lm(encoder_tokenizer())),
        ("bert", Embedding()),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_the_divergence_of_a_plan_is_that_of_the_pruned_model(family, task):
    model, rows = build(family, task=task.name), ROWS
    if task.name == "masked-lm":
        rows = torch.stack([task.masked(index, row) for index, row in enumerate(rows)])
    layers = ModelLayers(model, task)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    forms = {
        block.name: Form(Size(1 + block.layer % 2, block.members) if block.kind == "attention" else Size(40), None)
        for block in layers.anatomy.blocks
    }
    options = replace(PLAIN, ratio=0.0, target=Target(align=1))
    pruned = prune(model, rows, options, Known(None, forms=forms), task)
    moments = dict(dense_moments(ModelLayers(model, task), rows))
    levels = Levels(lambda _, block, __: pruned.plan.blocks[block.name].to_kept(), moments, options.damping)
    measure = Divergences(Walker(layers, rows.shape[1:], batch_size=5), rows, levels)
    whole = {block.name: block.size for block in layers.anatomy.blocks}
    dense, found = measure([whole, pruned.plan.sizes()], slice(3, 20))
    expected = kl(model, pruned.model, rows, task)[3:20]
    assert found == pytest.approx(expected.numpy(), rel=1e-3)
    assert expected.min() > 1e-3
    assert abs(dense).max() < 1e-6
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_removed_block_adds_nothing():
    model, rows = build("opt"), ROWS
    layers = ModelLayers(model)
    plan = {block.name: block.size for block in layers.anatomy.blocks} | {"layers.1.mlp": GONE}
    moments = dict(dense_moments(layers, rows))
    measure = Divergences(Walker(layers, rows.shape[1:]), rows, Levels(lambda *_: pytest.fail("fitted"), moments, 1e-3))
    (found,) = measure([plan], slice(None))
    silent = build("opt")
    with torch.no_grad():
        silent.model.decoder.layers[1].fc2.weight.zero_()
        silent.model.decoder.layers[1].fc2.bias.zero_()
    assert found == pytest.approx(kl(model, silent, rows).numpy(), rel=1e-4)


def test_of_a_large_vocabulary_the_most_probable_tokens_are_compared(monkeypatch):
    model = build()
    layers = CopiedLayers(model)
    pruned = prune(model, ROWS, PLAIN)
    moments = dict(dense_moments(layers, ROWS))

    def measured():
        levels = Levels(lambda _, block, __: pruned.plan.blocks[block.name].to_kept(), moments, PLAIN.damping)
        return Divergences(Walker(layers, ROWS.shape[1:]), ROWS, levels)([pruned.plan.sizes()], slice(None))[0]

    full = measured()
    monkeypatch.setattr(divergence, "TOP_K", 64)
    monkeypatch.setattr(divergence, "_WHOLE", 100)
    some = measured()
    assert (some < full).all()
    assert (some > 0.3 * full).all()  # of random logits, which have no likely tokens


@pytest.mark.slow
@pytest.mark.parametrize("options", [SEARCHED, replace(SEARCHED, axes=("kv-groups", "query-heads", "channels"))])
def test_the_record_agrees_with_the_pruned_models_and_the_ratio_holds(options):
    model = build(num_attention_heads=8, num_key_value_heads=4, head_dim=8)
    plain, searched = prune(model, ROWS, replace(options, refine="none")), prune(model, ROWS, options)
    record = searched.plan.refinement
    assert record is not None
    compared, apart = parts(ROWS)
    assert (record.rows, len(compared), len(apart)) == (12, 12, 12)
    assert record.rows_apart == (12 if record.divergence_after < record.divergence_before else 0)
    assert not {tuple(row) for row in compared.tolist()} & {tuple(row) for row in apart.tolist()}
    assert record.divergence_before == pytest.approx(float(kl(model, plain.model, compared).mean()), rel=1e-3)
    assert record.divergence_after <= record.divergence_before
    assert searched.prunable_ratio_removed >= 0.45 - 1e-9
    assert searched.after.prunable_parameters == pytest.approx(plain.after.prunable_parameters, rel=0.01)
    if record.confirmed:
        assert record.divergence_after == pytest.approx(float(kl(model, searched.model, compared).mean()), rel=1e-3)
        change = kl(model, searched.model, apart).mean() - kl(model, plain.model, apart).mean()
        assert record.change_apart == pytest.approx(float(change), rel=2e-3)
    assert (searched.plan.sizes() == plain.plan.sizes()) != record.confirmed
    again = prune(model, ROWS, options).plan
    assert again == searched.plan


@pytest.mark.slow
def test_a_plan_keeps_its_record_and_is_followed_without_a_search(tmp_path):
    model = build()
    made = prune(model, ROWS, replace(SEARCHED, compensation="joint"))
    made.plan.write(tmp_path / "plan.json")
    plan = read_plan(tmp_path / "plan.json")
    assert plan == made.plan
    layers = ModelLayers(model)
    check_plan(layers.anatomy, plan)
    followed = prune(model, ROWS, options_of(plan), plan=plan)
    assert followed.plan == plan
    planned = plan_layers(layers, ROWS, replace(SEARCHED, compensation="joint"))
    assert planned.refinement == plan.refinement
    assert planned.sizes() == plan.sizes()


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["bytes", "drop_layers"])
def test_it_works_with_a_budget_of_bytes_and_with_dropped_layers(budget):
    model = build()
    bytes_before = sum(p.numel() for p in model.model.layers.parameters()) * 2
    more: dict[str, Any] = {
        "bytes": {"ratio": 0.0, "budget": ByteBudget(int(0.6 * bytes_before), around=0, value=2)},
        "drop_layers": {"ratio": 0.6, "drop_layers": 1},
    }[budget]
    layers = ModelLayers(model)
    options = replace(SEARCHED, **more)
    plan = plan_layers(layers, ROWS, options, dropped=what_to_drop(layers, ROWS, options))
    assert plan.refinement is not None
    assert plan.refinement.candidates > 8
    check_plan(layers.anatomy, plan)  # the budget holds


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"refine": "anneal"}, "refine is 'anneal'; it must be one of none, search"),
        ({"refine_minutes": 0.0}, "refine_minutes is 0.0; it must be more than 0"),
        ({"refine_minutes": math.inf}, "refine_minutes is inf; it must be more than 0, and finite"),
        ({"refine": "none", "refine_minutes": 5.0}, "refine_minutes is 5; it has an effect only with refine search"),
        ({"allocation": "uniform"}, "refine: the search starts from the sizes of allocation error; allocation is"),
        ({"compensation": "none"}, "refine: the search measures refitted weights; compensation is 'none', use one of"),
        (
            {"ratio": 0.0, "budget": ByteBudget(10**5, around=0, value=2, levels=(None, "w8a8"))},
            "refine: the search measures weights that are not quantized, and the budget counts blocks in w8a8",
        ),
    ],
)
def test_options_that_it_cannot_have_are_refused(change, said):
    anatomy = ModelLayers(build()).anatomy
    with pytest.raises(InputError, match=f"^{said}"):
        check_options(anatomy, replace(SEARCHED, **change))


def test_experts_plans_and_masks_are_refused():
    with pytest.raises(InputError, match=r"^refine: the search does not refit experts"):
        check_options(ModelLayers(build("mixtral")).anatomy, SEARCHED)
    with pytest.raises(InputError, match=r"^refine: a plan or trained masks choose the sizes"):
        check_options(ModelLayers(build()).anatomy, SEARCHED, planned=True)


def test_too_few_rows_and_streamed_layers_are_refused_before_any_work():
    layers = ModelLayers(build())
    with pytest.raises(InputError, match=rf"15 rows are too few, use at least {MINIMUM_ROWS}"):
        plan_layers(layers, ROWS[:15], SEARCHED)
    layers.resident = False
    with pytest.raises(InputError, match="refine: search runs the model many times"):
        prune_layers(layers, ROWS, SEARCHED, pytest.fail)
