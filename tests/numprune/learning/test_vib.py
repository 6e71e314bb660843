"""What masks learn: the budget, the units that do nothing, and what becomes of the weights."""

import dataclasses

import pytest
import torch

from numprune.anatomy import read_anatomy
from numprune.budget import budget_of
from numprune.byte_budget import ByteBudget
from numprune.calibration import consumer_weight
from numprune.errors import InputError, IntegrityError
from numprune.families import FAMILIES
from numprune.learning import check_learning, learn, vib
from numprune.learning.constraint import Constraint
from numprune.learning.masks import Masks
from numprune.learning.rounding import rounded
from numprune.options import PruneOptions, sizes_allowed
from numprune.pruning import prune
from numprune.quantization.allocation import Form, block_bytes
from numprune.slices import GONE, Kept, Size
from numprune.target import Target
from tests.conftest import build_tiny
from tests.test_families import TASKS, output

LENGTH = 16
WHOLE_UNITS = ("kv-groups", "channels", "experts")
OPTIONS = PruneOptions(
    0.4, "vib", allocation="error", compensation="none", axes=WHOLE_UNITS, target=Target(align=1), seed=3
)


def rows(count, seed=0):
    tokens = torch.randint(0, 256, (count, LENGTH), generator=torch.Generator().manual_seed(seed))
    tokens[:, [3, 9]] = 258  # masks of a masked language model
    return tokens


ROWS, SELECTION = rows(64), rows(8, seed=1)
TOKENS = 60 * 32 * LENGTH  # 60 steps


def removed(anatomy, sizes):
    before, after = (budget_of(one).prunable_parameters for one in (anatomy, anatomy.keeping(sizes)))
    return 1 - after / before


@torch.no_grad()
def plant(model, anatomy, every):
    """Have only one of `every` units of each block do anything; return which, by block."""
    layers = model.get_submodule(anatomy.layers_path)
    alive = {}
    for block in anatomy.blocks:
        kept = Kept.whole(torch.arange(block.units)[::every], block.members)
        dead = torch.ones(block.channels, dtype=torch.bool)
        dead[block.reader.entries(kept, block.size)] = False
        consumer_weight(layers[block.layer], block)[:, dead] = 0
        alive[block.name] = kept.units.tolist()
    return alive


def test_units_that_do_nothing_go_and_the_masks_meet_the_budget_by_themselves():
    model = build_tiny(num_key_value_heads=4)
    alive = plant(model, read_anatomy(model.config), every=2)
    found = learn(model, ROWS, SELECTION, dataclasses.replace(OPTIONS, ratio=0.5), "faster", TOKENS)
    assert {name: block.kept for name, block in found.plan.blocks.items()} == alive
    assert found.record.divergence < 1e-5
    assert found.record.kept == pytest.approx(0.5, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "task"), [("gpt2", "causal-lm"), ("bert", "masked-lm"), ("roberta", "classification")]
)
def test_so_they_do_in_other_families_and_for_other_tasks(family, task):
    model = build_tiny(family, task=task)
    anatomy = read_anatomy(model.config)
    alive = plant(model, anatomy, every=2)
    found = learn(model, ROWS, SELECTION, dataclasses.replace(OPTIONS, ratio=0.5), "faster", TOKENS, TASKS[task])
    for name, block in found.plan.blocks.items():
        assert len(set(block.kept) - set(alive[name])) <= 0.05 * block.units, name
    assert found.record.divergence < 1e-3
    assert found.record.kept == pytest.approx(0.5, abs=0.05)


@pytest.mark.slow
def test_query_heads_and_blocks_that_do_nothing_go():
    model = build_tiny(num_hidden_layers=3)
    anatomy, layers = read_anatomy(model.config), model.model.layers
    dead = anatomy.of_kind("mlp")[1]
    with torch.no_grad():
        consumer_weight(layers[dead.layer], dead).zero_()
        for block in anatomy.of_kind("attention"):
            weight = consumer_weight(layers[block.layer], block)
            weight.view(len(weight), block.units, block.members, -1)[:, :, 0] = 0
    left = {block.name: block.size for block in anatomy.blocks} | {dead.name: GONE}
    left |= {block.name: Size(block.units, block.members - 1) for block in anatomy.of_kind("attention")}
    options = dataclasses.replace(
        OPTIONS, ratio=removed(anatomy, left) - 1e-6, axes=(*WHOLE_UNITS, "query-heads"), skips=True
    )
    found = learn(model, ROWS, SELECTION, options, "faster", TOKENS)
    assert found.plan.sizes() == left
    assert all(
        found.plan.blocks[block.name].kept_members == [[1]] * block.units for block in anatomy.of_kind("attention")
    )
    assert found.record.divergence < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["faster", "fast"])
def test_channels_of_experts_that_do_nothing_go(variant):
    """As many in every expert of a layer, each its own."""
    model = build_tiny("mixtral")
    anatomy = read_anatomy(model.config)
    alive = {}
    with torch.no_grad():
        for block in anatomy.of_kind("experts"):
            down = model.get_submodule(anatomy.layers_path)[block.layer].get_parameter(block.reader.tensor)
            draw = torch.rand(block.units, block.members, generator=torch.Generator().manual_seed(block.layer))
            alive[block.name] = draw.argsort(1)[:, : block.members // 3].sort(1).values
            dead = torch.ones(block.units, block.members).scatter_(1, alive[block.name], 0.0).bool()
            down.mul_(~dead[:, None])
    options = dataclasses.replace(OPTIONS, ratio=0.4, axes=("expert-channels",), target=Target(align=8))
    found = learn(model, ROWS, SELECTION, options, variant, TOKENS, learning_rate=1e-5)
    assert found.record.removed >= 0.4
    for name, channels in alive.items():
        kept = found.plan.blocks[name].to_kept()
        assert kept.size.units == len(channels)
        assert kept.size.members % 8 == 0
        for own, left in zip(kept.members.tolist(), channels.tolist(), strict=True):
            assert {*left} <= {*own}
    base = model if found.model is None else found.model
    pruned = prune(base, ROWS[:8], options, plan=found.plan)
    assert pruned.prunable_ratio_removed == pytest.approx(found.record.removed)


def test_masks_on_channels_of_experts_with_biases_are_refused():
    options = dataclasses.replace(OPTIONS, axes=("experts", "expert-channels"))
    with pytest.raises(InputError, match="axes: the experts of gpt_oss have biases, and masks are on whole ones"):
        check_learning(read_anatomy(build_tiny("gpt_oss").config), options)


def test_where_the_target_leaves_one_size_masks_choose_its_units():
    model = build_tiny(hidden_size=96, num_attention_heads=6, num_key_value_heads=3)
    anatomy, layers = read_anatomy(model.config), model.model.layers
    attention = anatomy.of_kind("attention")
    with torch.no_grad():
        for block in attention:
            consumer_weight(layers[block.layer], block)[:, : block.channels // 3] = 0
    options = dataclasses.replace(OPTIONS, ratio=0.3, target=Target(align=1, tensor_parallel=4))
    assert {len(sizes_allowed(anatomy, options)[block.name]) for block in attention} == {1}
    found = learn(model, ROWS, SELECTION, options, "faster", TOKENS // 4)
    assert all(found.plan.blocks[block.name].kept == [1, 2] for block in attention)


def test_only_masks_are_trained_by_faster():
    model = build_tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = learn(model, ROWS, SELECTION, OPTIONS, "faster", TOKENS // 10)
    assert found.model is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_trained_weights_are_others_and_compute_what_was_judged():
    model = build_tiny()
    dense = output(model, tokens=SELECTION)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = learn(model, ROWS, SELECTION, OPTIONS, "fast", TOKENS // 4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    weights = found.model.state_dict()
    assert not any(torch.equal(weights[name], value) for name, value in before.items())
    pruned = prune(found.model, ROWS[:8], OPTIONS, plan=found.plan)
    left = TASKS["causal-lm"].divergence(output(pruned.model, tokens=SELECTION), dense, SELECTION).mean()
    assert float(left) == pytest.approx(found.record.divergence, rel=1e-4)


def test_the_same_seed_gives_the_same_plan_and_another_seed_other_masks():
    def record(seed):
        return learn(build_tiny(), ROWS, SELECTION, dataclasses.replace(OPTIONS, seed=seed), "faster", TOKENS // 10)

    one, same, other = record(3), record(3), record(4)
    assert one.plan == same.plan
    assert one.record.divergence == same.record.divergence
    assert one.record.kept != other.record.kept


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "mixtral", "qwen2_moe"])
@pytest.mark.parametrize(
    "more",
    [
        {"ratio": 0.3},
        {"ratio": 0.5, "target": Target(align=16)},
        {"ratio": 0.3, "target": Target(align=8, tensor_parallel=2), "floors": {"attention": 0.5}},
        {"ratio": 0.3, "keep": ["layers.0"]},
        {"ratio": 0.3, "allocation": "uniform"},
        {"ratio": 0.5, "skips": True, "target": Target(align=32)},
        {"ratio": 0.3, "axes": (*WHOLE_UNITS, "query-heads")},
    ],
    ids=lambda more: " ".join(more),
)
def test_the_budget_is_met_once_masks_are_rounded(family, more):
    if more.get("skips") and family == "bert":
        pytest.skip("a norm follows each of its blocks")
    anatomy = read_anatomy(build_tiny(family, num_hidden_layers=4).config)
    options = dataclasses.replace(OPTIONS, **more)
    if family == "qwen2_moe" and "align" in str(more):
        options = dataclasses.replace(options, ratio=0.2)
    check_learning(anatomy, options)
    allowed = sizes_allowed(anatomy, options)
    constraint = Constraint("parameters", anatomy, LENGTH)
    masks = Masks(vib._masked(constraint, options), seed=0)
    with torch.no_grad():
        masks.log_variance.add_(6 * torch.randn(len(masks.weights), generator=torch.Generator().manual_seed(0)) + 6)
    found = rounded(constraint, masks, options)
    kept, sizes = found.kept, found.sizes
    assert all(size in allowed[name] for name, size in sizes.items())
    share = removed(anatomy, sizes)
    if options.allocation == "uniform":
        assert anatomy.keeping(sizes).is_uniform
        assert options.ratio - 0.05 < share < options.ratio + 0.1
    else:
        assert options.ratio - 1e-9 < share < options.ratio + 0.1
    for name, (own, members) in masks.prices().items():
        carried = own + members.sum(1)
        gone = torch.ones(len(carried), dtype=torch.bool).index_fill(0, kept[name].units, False)
        if gone.any() and not gone.all():
            assert carried[gone].max() <= carried[~gone].min()


@pytest.mark.parametrize("counted", ["flops", "kv-bytes"])
def test_other_constraints_are_met_and_their_plans_can_be_followed(counted):
    model = build_tiny(num_key_value_heads=4, num_hidden_layers=3)
    options = dataclasses.replace(OPTIONS, ratio=0.5)
    found = learn(model, ROWS, SELECTION, options, "faster", TOKENS // 4, counted=counted)
    anatomy, sizes = read_anatomy(model.config), found.plan.sizes()
    assert found.record.constraint == counted
    assert 0.5 <= found.record.removed < 0.6
    assert found.record.removed == Constraint(counted, anatomy, LENGTH).removed(sizes)
    if counted == "kv-bytes":
        assert all(sizes[block.name] == block.size for block in anatomy.of_kind("mlp"))
    assert found.plan.ratio == pytest.approx(removed(anatomy, sizes))
    pruned = prune(model, ROWS[:8], dataclasses.replace(options, ratio=found.plan.ratio), plan=found.plan)
    assert pruned.prunable_ratio_removed == pytest.approx(found.plan.ratio)


def bytes_of(model):
    return sum(parameter.numel() for parameter in model.parameters()) * 2  # as in bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_budget_of_bytes_is_met(family):
    model = build_tiny(family, num_hidden_layers=3)
    anatomy = read_anatomy(model.config)
    blocks = sum(block_bytes(block, Form(block.size, None), 2) for block in anatomy.blocks)
    dense = bytes_of(model)
    budget = ByteBudget(dense - blocks * 2 // 5, dense - blocks, 2)
    options = dataclasses.replace(OPTIONS, ratio=0.0, budget=budget, skips=True)
    found = learn(model, ROWS, SELECTION, options, "faster", TOKENS // 4, counted="bytes")
    assert found.record.constraint == "bytes"
    assert 0.4 <= found.record.removed < 0.45
    assert (found.plan.ratio, found.plan.budget) == (0, budget)
    pruned = prune(model, ROWS[:8], options, plan=found.plan)
    assert 0.95 * budget.limit < bytes_of(pruned.model) <= budget.limit


@pytest.mark.parametrize(
    ("more", "counted", "said"),
    [
        ({}, "parameters", "budget: it limits bytes, and the constraint is parameters; leave one of them out"),
        ({"budget": None, "ratio": 0.3}, "bytes", "constraint bytes: they are limited by a budget, like 6GiB; give on"),
        ({"ratio": 0.3}, "bytes", r"ratio is 0\.3, and a budget is given"),
        ({"axes": (*WHOLE_UNITS, "hidden-size")}, "bytes", "axes: a budget is met by units alone; leave out hidden-si"),
        ({"budget": ByteBudget(10**6, 0, 4)}, "bytes", "the model takes .* as it is: nothing has to go"),
        ({"budget": ByteBudget(10**4, 0, 4)}, "bytes", "the budget is 10,000 bytes, but embeddings, norms and the"),
        ({"budget": ByteBudget(10**5, 0, 4, ("w8a8",))}, "bytes", "masks choose sizes for weights that are not quant"),
    ],
)
def test_budgets_that_cannot_be_met_are_refused(more, counted, said):
    anatomy = read_anatomy(build_tiny().config)
    options = dataclasses.replace(OPTIONS, **{"ratio": 0.0, "budget": ByteBudget(10**5, 0, 4), **more})
    with pytest.raises(InputError, match=said):
        check_learning(anatomy, options, counted, LENGTH)


@pytest.mark.parametrize(
    ("family", "more", "said"),
    [
        ("bert", {}, "constraint kv-bytes: the model has none; use another constraint"),
        ("llama", {"allocation": "uniform"}, "allocation is 'uniform', which splits parameters; use error"),
        ("llama", {"ratio": 0.9}, r"ratio is 0\.9, but with the minimum .* of the KV-cache bytes can be removed"),
        ("llama", {"axes": ("channels",)}, "axes: the constraint kv-bytes only removes KV groups; add kv-groups"),
        ("llama", {"target": Target(quantization_group=64)}, r"layers\.0\.mlp: none of its sizes .* suits the target"),
    ],
)
def test_constraints_that_cannot_be_met_are_refused(family, more, said):
    anatomy = read_anatomy(build_tiny(family).config)
    with pytest.raises(InputError, match=said):
        check_learning(anatomy, dataclasses.replace(OPTIONS, **more), "kv-bytes", LENGTH)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"drop_layers": 1}, "drop_layers: masks learn units, not layers"),
        ({"allocation": "global"}, "allocation is 'global'; masks are rounded by one of error, uniform"),
        ({"ratio": 0.99}, "ratio is 0.99, but with the minimum"),
        ({"ratio": 0.0, "keep": ["attention", "mlp"]}, "leave every block a single size"),
        ({"criterion": "vibes"}, "criterion is 'vibes'"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_run(more, said):
    with pytest.raises(InputError, match=said):
        learn(build_tiny(), ROWS, SELECTION, dataclasses.replace(OPTIONS, **more), "faster", TOKENS)


def test_weights_that_diverge_in_the_last_step_are_no_result():
    with pytest.raises(IntegrityError, match=r"diverged at step 1 of 1: .* choose a learning rate below 1e\+36"):
        learn(build_tiny(), ROWS, SELECTION, OPTIONS, "fast", 32 * LENGTH, learning_rate=1e36)


def test_masks_are_no_criterion_that_pruning_scores_by():
    with pytest.raises(InputError, match="criterion is 'vib'; it must be one of"):
        prune(build_tiny(), ROWS, OPTIONS)


def test_rows_of_another_tokenizer_are_refused():
    with pytest.raises(InputError, match="outside the model's vocabulary"):
        learn(build_tiny(), ROWS, SELECTION + 200, OPTIONS, "faster", TOKENS)


@pytest.mark.slow
def test_every_family_of_the_task_is_learned():
    """One step each: nothing in the way is about a family."""
    for name, family in FAMILIES.items():
        if family.patches:
            continue  # masks learn on text
        model = build_tiny(name)
        options = dataclasses.replace(OPTIONS, ratio=0.1)
        found = learn(model, ROWS[:4], SELECTION[:2], options, "fast", 8 * LENGTH, TASKS[family.tasks[0]])
        assert removed(read_anatomy(model.config), found.plan.sizes()) > 0.1 - 1e-9, name
