"""Masks on units: their effect in every family, and the terms of the bottleneck."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from numprune.anatomy import read_anatomy
from numprune.budget import budget_of
from numprune.families import FAMILIES
from numprune.learning.constraint import Constraint, Lagrangian, share_of
from numprune.learning.masks import Masked, Masks, fold, masked
from numprune.options import PruneOptions
from numprune.plans import BlockPlan
from numprune.pruning import describe, prune
from numprune.slices import Kept, Size
from numprune.target import Target
from tests.conftest import build_tiny
from tests.test_families import ROWS, TASKS, output

of_task = pytest.mark.parametrize(
    ("family", "task"),
    [(name, task) for name, family in FAMILIES.items() if not family.patches for task in family.tasks],
)


def build(family="llama", task=None):
    """Return a tiny model, its anatomy, its layers and masks on all units that can go by themselves."""
    model = build_tiny(family, task=task)
    anatomy = read_anatomy(model.config)
    masks = masks_on([block for block in anatomy.blocks if block.separable])
    return model, anatomy, model.get_submodule(anatomy.layers_path), masks


def masks_on(blocks):
    return Masks([Masked(block, block.parameters_per_unit) for block in blocks], seed=0)


def draw(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) + 0.5


@of_task
def test_masks_of_one_change_nothing_and_no_mask_is_left_behind(family, task):
    model, _, layers, masks = build(family, task)
    dense = output(model, task)
    with torch.no_grad():
        masks.mean.fill_(1)
        masks.log_variance.fill_(-torch.inf)
        values = masks.sample(len(ROWS), torch.Generator().manual_seed(0))
        with masked(layers, masks, values):
            assert torch.allclose(output(model, task), dense, rtol=0, atol=1e-6)
        with masked(layers, masks, values * draw(len(masks.weights))):
            assert not torch.allclose(output(model, task), dense, rtol=0, atol=1e-3)
    assert torch.equal(output(model, task), dense)


@of_task
def test_folded_masks_compute_what_masks_did(family, task):
    model, _, layers, masks = build(family, task)
    values = draw(len(masks.weights))
    with masked(layers, masks, values[None]):
        wanted = output(model, task)
    fold(layers, masks, values)
    assert torch.allclose(output(model, task), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen3", "phi3", "gpt_neox", "bert", "roberta"])
def test_masks_of_zero_are_the_cut(family):
    """Folded, then cut by a plan without compensation: the model computes what it did with the masks."""
    task = FAMILIES[family].tasks[0]
    model, anatomy, layers, masks = build(family, task)
    kept = {block.name: Kept.whole(torch.arange(block.units)[::2], block.members) for block in anatomy.blocks}
    values = draw(len(masks.weights)) * masks.indicator(kept)
    with masked(layers, masks, values[None]):
        wanted = output(model, task)
    fold(layers, masks, values)
    options = PruneOptions(0.3, allocation="error", compensation="none", target=Target(align=1))
    plan = describe(anatomy, ROWS, options, {name: BlockPlan(units=1, kept=[0]) for name in kept})
    blocks = {block.name: BlockPlan.of(block, kept[block.name], None) for block in anatomy.blocks}
    pruned = prune(model, ROWS, options, task=TASKS[task], plan=plan.model_copy(update={"blocks": blocks}))
    assert torch.allclose(output(pruned.model, task), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen3"])
def test_masks_of_zero_on_query_heads_are_the_cut(family):
    model = build_tiny(family)
    anatomy = read_anatomy(model.config)
    layers, attention = model.get_submodule(anatomy.layers_path), anatomy.of_kind("attention")
    masks = Masks([Masked(block, 9.0, 2.0, by_members=True) for block in attention], seed=0)
    kept = {block.name: Kept.whole(torch.arange(block.units), block.members) for block in anatomy.blocks}
    kept |= {block.name: Kept(torch.arange(block.units), torch.arange(block.units)[:, None] % 2) for block in attention}
    values = draw(masks.leaves) * masks.indicator(kept)
    with masked(layers, masks, values[None]):
        wanted = output(model)
    fold(layers, masks, values)
    axes = ("kv-groups", "query-heads", "channels")
    options = PruneOptions(0.1, allocation="error", compensation="none", axes=axes, target=Target(align=1))
    blocks = {block.name: BlockPlan.of(block, kept[block.name], None) for block in anatomy.blocks}
    pruned = prune(model, ROWS, options, plan=describe(anatomy, ROWS, options, blocks))
    assert torch.allclose(output(pruned.model), wanted, rtol=0, atol=1e-5)


def masks_on_channels_of_experts(family):
    """Return a tiny model, its anatomy, its layers, and masks on its experts and their channels."""
    model = build_tiny(family)
    anatomy = read_anatomy(model.config)
    experts = [Masked(block, 9.0, 0.25, by_members=True) for block in anatomy.of_kind("experts")]
    return model, anatomy, model.get_submodule(anatomy.layers_path), Masks(experts, seed=0)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_masks_on_channels_of_experts_are_folded_and_cut(family):
    model, anatomy, layers, masks = masks_on_channels_of_experts(family)
    dense = output(model)
    with masked(layers, masks, torch.ones(1, masks.leaves)):
        assert torch.allclose(output(model), dense, rtol=0, atol=1e-5)
    kept = {block.name: Kept.whole(torch.arange(block.units), block.members) for block in anatomy.blocks}
    for block in masks.blocks:
        channels = torch.rand(block.units, block.members, generator=torch.Generator().manual_seed(block.layer))
        kept[block.name] = Kept(torch.arange(block.units), channels.argsort(1)[:, :16].sort(1).values)
    values = draw(masks.leaves) * masks.indicator(kept)
    with masked(layers, masks, values[None]):
        wanted = output(model)
    assert torch.equal(output(model), dense)
    fold(layers, masks, values)
    assert torch.allclose(output(model), wanted, rtol=0, atol=1e-5)
    options = PruneOptions(0.1, allocation="error", compensation="none", target=Target(align=8))
    blocks = {block.name: BlockPlan.of(block, kept[block.name], None) for block in anatomy.blocks}
    pruned = prune(model, ROWS, options, plan=describe(anatomy, ROWS, options, blocks))
    assert torch.allclose(output(pruned.model), wanted, rtol=0, atol=1e-5)


def test_the_gradients_of_masks_on_channels_of_experts_are_those_of_finite_differences():
    model, _, layers, masks = masks_on_channels_of_experts("mixtral")
    model = model.double()
    values = draw(len(ROWS), masks.leaves).double().requires_grad_()  # each row has its own

    def loss(values):
        with masked(layers, masks, values):
            return model(ROWS).logits.square().mean()

    (found,) = torch.autograd.grad(loss(values), [values])
    with torch.no_grad():
        for index in found.abs().flatten().topk(3).indices.tolist():
            row, leaf = divmod(index, masks.leaves)
            step = torch.zeros_like(values)
            step[row, leaf] = 1e-2  # norms and routers compute in float32
            slope = (loss(values + step) - loss(values - step)) / 2e-2
            assert float(found[row, leaf]) == pytest.approx(float(slope), rel=1e-2)


def test_masks_of_query_heads_and_blocks_multiply_those_of_units():
    attention, mlp = read_anatomy(build_tiny().config).blocks[:2]
    masks = Masks(
        [Masked(attention, 100.0, 30.0, by_members=True, as_a_whole=True), Masked(mlp, 10.0, as_a_whole=True)], seed=0
    )
    units, heads = attention.units, attention.units * attention.members
    values = draw(len(masks.mean))
    groups, of_heads, block = values[:units], values[units : units + heads], values[units + heads]
    leaves = masks.by_block(masks.at_leaves(values))
    assert torch.allclose(leaves[attention.name], groups.repeat_interleave(attention.members) * of_heads * block)
    assert torch.allclose(leaves[mlp.name], values[units + heads + 1 : -1] * values[-1])
    costs = masks.costs.tolist()
    assert costs[: units + 1] == [100 - 30 * attention.members] * units + [30]
    assert sum(costs) == 100 * units + 10 * mlp.units
    with torch.no_grad():
        masks.log_variance[-1] = 30.0  # of the whole MLP: nothing comes through its units
    own, members = masks.prices()[mlp.name]
    assert own.max() < 1e-6
    assert members.shape == (mlp.units, mlp.members)
    assert masks.prices()[attention.name][0].min() > 1


def test_each_row_has_masks_of_its_own_also_where_a_model_flattens_its_rows():
    for family in ("llama", "opt"):
        model, _, layers, masks = build(family)
        values = draw(len(ROWS), len(masks.weights))
        with masked(layers, masks, values):
            together = output(model)
        for row, own in enumerate(values):
            with masked(layers, masks, own[None]):
                assert torch.allclose(output(model, tokens=ROWS[row : row + 1])[0], together[row], rtol=0, atol=1e-5)


def test_the_bottleneck_is_the_least_divergence_from_a_prior_around_zero():
    _, _, _, masks = build()
    with torch.no_grad():
        masks.mean.copy_(draw(len(masks.weights)) * 2 - 1.5)
        masks.log_variance.copy_(8 * draw(len(masks.weights), seed=1) - 8)
    mean, deviation = masks.mean.double(), (masks.log_variance.double() / 2).exp()
    prior = (mean.square() + deviation.square()).sqrt()
    wanted = kl_divergence(Normal(mean, deviation), Normal(torch.zeros_like(mean), prior))
    assert torch.allclose(masks.information.double(), wanted, rtol=1e-4, atol=1e-6)
    for other in (0.9, 1.1):
        assert (kl_divergence(Normal(mean, deviation), Normal(torch.zeros_like(mean), other * prior)) > wanted).all()


def test_the_gradients_of_the_bottleneck_are_the_closed_forms():
    _, _, _, masks = build()
    gradients = torch.autograd.grad(masks.information.sum(), [masks.mean, masks.log_variance])
    squares, variance = masks.mean.square(), masks.log_variance.exp()
    assert torch.allclose(gradients[0], masks.mean / (squares + variance), rtol=1e-3)
    assert torch.allclose(gradients[1], -squares / (squares + variance) / 2, rtol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "bert"])
def test_the_gradients_of_masks_are_those_of_finite_differences(family):
    task = FAMILIES[family].tasks[0]
    model, _, layers, masks = build(family, task)
    values = draw(1, len(masks.weights)).requires_grad_()

    def loss(masked_by):
        with masked(layers, masks, masked_by):
            return TASKS[task].output(model, ROWS, torch.ones_like(ROWS)).double().square().mean()

    (found,) = torch.autograd.grad(loss(values), values)
    last = len(masks.weights) - 1
    for unit in (last - 1, last) if family == "mixtral" else (0, last // 2, last):  # what follows may be routed anew
        step = torch.zeros_like(values).index_fill(1, torch.tensor([unit]), 0.01)
        with torch.no_grad():
            slope = (loss(values + step) - loss(values - step)) / 0.02
        assert float(found[0, unit]) == pytest.approx(float(slope), rel=0.02, abs=1e-4)


def test_the_share_that_masks_keep_is_that_of_parameters():
    _, anatomy, _, masks = build()
    constraint = Constraint("parameters", anatomy, ROWS.shape[1])
    share = share_of(constraint, masks)
    with torch.no_grad():
        masks.mean.fill_(1)
        masks.log_variance.fill_(-30.0)
        assert float(share.kept(masks)) == pytest.approx(1)
        gone = anatomy.blocks[1]
        masks.by_block(masks.log_variance)[gone.name].fill_(30.0)
        whole = sum(block.parameters(block.size) for block in anatomy.blocks)
        assert float(share.kept(masks)) == pytest.approx(1 - gone.parameters(gone.size) / whole, abs=1e-6)
        some = masks_on(anatomy.blocks[:1])  # the other blocks stay
        assert float(share_of(constraint, some).kept(some)) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "bert"])
def test_a_constraint_counts_what_the_budget_does(family):
    anatomy, length = read_anatomy(build_tiny(family).config), 16
    sizes = {block.name: Size(max(block.units // 2, 2), block.members) for block in anatomy.blocks}

    def wanted(found):
        budget = budget_of(found)
        looked_at = length if family == "bert" else length // 2
        flops = budget.flops_per_token - 2 * found.output_parameters
        return {
            "parameters": budget.prunable_parameters,
            "flops": flops + looked_at * budget.attention_flops_per_context_token,
            "kv-bytes": budget.kv_bytes_per_token,
        }

    before, after = wanted(anatomy), wanted(anatomy.keeping(sizes))
    for counted, whole in before.items():
        constraint = Constraint(counted, anatomy, length)
        assert constraint.whole == whole
        if whole:
            assert constraint.removed(sizes) == pytest.approx(1 - after[counted] / whole)


def test_the_penalty_grows_while_the_constraint_is_missed():
    lagrangian = Lagrangian(rate=0.5, quadratic=3.0)
    excess = torch.tensor(0.2)
    assert float(lagrangian.penalty(excess)) == pytest.approx(3 * 0.04)
    lagrangian.ascend(0.2)
    lagrangian.ascend(0.2)
    assert float(lagrangian.penalty(excess)) == pytest.approx(0.2 * 0.2 + 3.04 * 0.04)
    lagrangian.ascend(-0.4)  # kept too little: the pressure falls
    assert float(lagrangian.penalty(excess)) == pytest.approx(0 * 0.2 + 3.12 * 0.04)
