import itertools
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from numprune import allocation, knapsack
from numprune.allocation import by_error, check_ratio, global_sort, keep_highest, uniform
from numprune.anatomy import read_anatomy
from numprune.axes import AXES, DEFAULT_AXES, Limits
from numprune.budget import budget_of
from numprune.curves import error_at
from numprune.errors import InputError
from numprune.slices import Size
from numprune.target import HEAD_SHAPES, Target, allowed_sizes


def anatomy(**overrides):
    sizes = {
        "hidden_size": 256,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "intermediate_size": 704,
        "num_hidden_layers": 3,
    }
    return read_anatomy(AutoConfig.for_model("llama", **(sizes | overrides)))


def random_errors(base, seed):
    """Error curves that never fall, and are not convex."""
    generator = torch.Generator().manual_seed(seed)
    return {
        block.name: torch.cat([torch.zeros(1, block.members), torch.rand(block.size, generator=generator).square()])
        .cumsum(0)
        .cumsum(1)
        .double()
        for block in base.blocks
    }


def column(errors):
    """The error curve of a block that loses units and no members."""
    return errors.double()[:, None]


def total_error(base, errors, kept):
    return sum(error_at(errors, block, kept[block.name]) for block in base.blocks)


def removed(before, kept):
    return 1 - budget_of(before.keeping(kept)).prunable_parameters / budget_of(before).prunable_parameters


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(
    ratio=st.floats(0, 0.99),
    align=st.sampled_from([1, 8, 64, 128]),
    groups=st.sampled_from([1, 2, 4, 8]),
    seed=st.integers(0, 99),
    kind=st.sampled_from(["uniform", "global", "error"]),
)
def test_every_allocation_reaches_the_ratio_keeps_the_floor_and_the_alignment(ratio, align, groups, seed, kind):
    base = anatomy(num_key_value_heads=groups)
    allowed = allowed_sizes(base, Target(align=align), Limits())
    try:
        check_ratio(base, ratio, allowed)
    except InputError:
        return
    if kind == "uniform":
        kept = uniform(base, ratio, allowed)
        step = sum(block.parameters_per_unit for block in base.of_kind("mlp")) * align
        assert base.keeping(kept).is_uniform
    elif kind == "error":
        kept = by_error(base, ratio, allowed, random_errors(base, seed))
        step = max(block.parameters_per_unit * (align if block.kind == "mlp" else 1) for block in base.blocks)
        assert removed(base, kept) >= ratio - 1e-4
    else:
        generator = torch.Generator().manual_seed(seed)
        scores = {block.name: torch.randn(block.units, generator=generator) for block in base.blocks}
        kept = global_sort(base, ratio, allowed, scores)
        step = max(block.parameters_per_unit * (align if block.kind == "mlp" else 1) for block in base.blocks)
    assert abs(removed(base, kept) - ratio) * budget_of(base).prunable_parameters <= step
    for block in base.blocks:
        units, members = kept[block.name]
        assert 1 <= units <= block.units
        assert members == block.members
        if block.kind == "mlp" and units < block.units:
            assert units % align == 0


def test_global_removes_the_lowest_scores_of_the_whole_model():
    base = anatomy(num_hidden_layers=2)
    scores = {block.name: torch.full((block.units,), 5.0) for block in base.blocks}
    scores["layers.1.mlp"][:200] = torch.linspace(0, 1, 200)
    kept = global_sort(base, 0.05, allowed_sizes(base, Target(align=1), Limits()), scores)
    lost = {name: block.units - kept[name].units for name, block in zip(kept, base.blocks, strict=True)}
    assert lost == {
        "layers.0.attention": 0,
        "layers.0.mlp": 0,
        "layers.1.attention": 0,
        "layers.1.mlp": lost["layers.1.mlp"],
    }
    assert 0 < lost["layers.1.mlp"] <= 200


def test_global_counts_cost_in_parameters_not_units():
    base = anatomy(num_hidden_layers=1)
    scores = {"layers.0.attention": torch.tensor([0.0, 1.0, 2.0, 3.0]), "layers.0.mlp": torch.full((704,), 9.0)}
    group_cost = base.blocks[0].parameters_per_unit / budget_of(base).prunable_parameters
    assert global_sort(base, group_cost, allowed_sizes(base, Target(align=1), Limits()), scores)[
        "layers.0.attention"
    ] == Size(3, 2)


def test_uniform_keeps_everything_at_ratio_zero():
    base = anatomy()
    assert uniform(base, 0, allowed_sizes(base, Target(), Limits())) == {
        block.name: block.size for block in base.blocks
    }


def test_uniform_splits_the_ratio_evenly_if_groups_allow():
    base = anatomy(num_key_value_heads=8)
    kept = uniform(base, 0.25, allowed_sizes(base, Target(align=1), Limits()))
    assert kept["layers.0.attention"] == Size(6)
    assert kept["layers.0.mlp"] == Size(528)


@pytest.mark.parametrize(
    ("ratio", "align", "message"),
    [
        (1.0, 8, "ratio is 1.0; it must be at least 0 and under 1"),
        (-0.1, 8, "ratio is -0.1"),
        (float("nan"), 8, "ratio is nan"),
        (0.3, 0, "align is 0"),
        (0.99, 8, r"at most 0\.9\d+ of the prunable"),
    ],
)
def test_impossible_ratios_are_refused(ratio, align, message):
    with pytest.raises(InputError, match=message):
        check_ratio(anatomy(), ratio, allowed_sizes(anatomy(), Target(align=align), Limits()))


def test_uniform_refuses_layers_that_differ():
    base = anatomy()
    kept = {block.name: block.size for block in base.blocks} | {"layers.0.mlp": Size(512)}
    with pytest.raises(InputError, match="layers differ already"):
        uniform(base.keeping(kept), 0.2, allowed_sizes(base.keeping(kept), Target(), Limits()))


def test_head_shapes_are_limited_and_the_mlps_make_up_the_difference():
    base = anatomy(num_hidden_layers=7, num_attention_heads=8, num_key_value_heads=8)
    scores = {}
    for block in base.blocks:  # the attention of layer i is to lose i heads
        lost = block.layer if block.kind == "attention" else 300
        scores[block.name] = torch.cat([torch.zeros(lost), torch.ones(block.units - lost)])
    ratio = 1 - sum(
        (block.units - int((scores[block.name] == 0).sum())) * block.parameters_per_unit for block in base.blocks
    ) / (budget_of(base).prunable_parameters)
    kept = global_sort(base, ratio, allowed_sizes(base, Target(align=1), Limits()), scores)
    heads = [kept[block.name].units for block in base.of_kind("attention")]
    assert heads == sorted(heads, reverse=True)
    assert len(set(heads)) == HEAD_SHAPES
    assert sum(abs(count - 8 + layer) for layer, count in enumerate(heads)) == 3  # seven counts on four levels
    step = max(block.parameters_per_unit for block in base.of_kind("mlp"))
    assert abs(removed(base, kept) - ratio) * budget_of(base).prunable_parameters <= step


def test_skips_remove_a_worthless_block_but_never_the_last_of_its_kind():
    base = anatomy(num_hidden_layers=2)
    scores = {block.name: torch.full((block.units,), 9.0) for block in base.blocks}
    scores["layers.1.mlp"] = torch.zeros(704)
    scores["layers.0.attention"] = torch.zeros(4)
    scores["layers.1.attention"] = torch.full((4,), 1.0)
    allowed = allowed_sizes(base, Target(align=64), Limits(skips=True))
    kept = global_sort(base, 0.6, allowed, scores)
    assert kept["layers.1.mlp"] == kept["layers.0.attention"] == Size(0)
    assert kept["layers.1.attention"] == Size(1, 2)
    assert removed(base, kept) == pytest.approx(0.6, abs=0.04)


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.35, 0.6])
@pytest.mark.parametrize(
    ("seed", "skips", "axes"), [(0, False, DEFAULT_AXES), (1, True, DEFAULT_AXES), (2, True, AXES), (3, False, AXES)]
)
def test_error_allocation_is_optimal_at_the_ratio(ratio, seed, skips, axes):
    base = anatomy(num_hidden_layers=2)
    allowed = allowed_sizes(base, Target(align=128), Limits(tuple(axes), skips=skips))
    errors = random_errors(base, seed)
    for block in base.of_kind("attention"):  # else all of it would go first, which is not allowed
        errors[block.name] *= 100
    names = [block.name for block in base.blocks]
    every = (dict(zip(names, counts, strict=True)) for counts in itertools.product(*(allowed[name] for name in names)))
    least = min(total_error(base, errors, kept) for kept in every if removed(base, kept) >= ratio - 1e-9)
    kept = by_error(base, ratio, allowed, errors)
    assert removed(base, kept) >= ratio - 1e-9
    assert total_error(base, errors, kept) == pytest.approx(least)


def test_error_allocation_with_rounded_costs_is_near_optimal(monkeypatch):
    base, errors = anatomy(), random_errors(anatomy(), 3)
    allowed = allowed_sizes(base, Target(align=8), Limits())
    exact = by_error(base, 0.4, allowed, errors)
    monkeypatch.setattr(knapsack, "_SHARES", 300)
    rounded = by_error(base, 0.4, allowed, errors)
    assert removed(base, rounded) == pytest.approx(0.4, abs=6 * 0.4 / 300)
    assert total_error(base, errors, rounded) == pytest.approx(total_error(base, errors, exact), rel=0.05)


def test_error_allocation_limits_head_shapes_and_keeps_the_last_of_a_kind():
    base = anatomy(num_hidden_layers=7, num_attention_heads=8, num_key_value_heads=8)
    errors = {}
    for block in base.blocks:  # the first heads of layer i are free, all that is left is dear
        free = block.layer if block.kind == "attention" else 300
        errors[block.name] = column(torch.cat([torch.zeros(free + 1), torch.arange(1.0, block.units - free + 1)]))
    kept = by_error(base, 0.4, allowed_sizes(base, Target(align=1), Limits()), errors)
    assert len({kept[block.name] for block in base.of_kind("attention")}) == HEAD_SHAPES
    nothing = {block.name: column(torch.zeros(block.units + 1)) for block in base.blocks}
    kept = by_error(base, 0.9, allowed_sizes(base, Target(), Limits(skips=True)), nothing)
    assert any(kept[block.name].units for block in base.of_kind("attention"))
    assert any(kept[block.name].units for block in base.of_kind("mlp"))


@pytest.mark.parametrize("kind", ["global", "error"])
def test_head_shapes_are_limited_if_a_layer_already_has_fewer_heads(kind):
    """The numbers nearest to what is kept have a least of four, and one layer has only three."""
    base = anatomy(num_hidden_layers=11, num_attention_heads=8, num_key_value_heads=8)
    heads = [8, 8, 7, 7, 6, 6, 5, 5, 4, 4, 3]
    base = base.keeping({block.name: block.size for block in base.blocks} | {"layers.10.attention": Size(3)})
    allowed, free = allowed_sizes(base, Target(align=1), Limits()), {}
    for block in base.blocks:
        free[block.name] = block.units - heads[block.layer] if block.kind == "attention" else 300
    ratio = sum(free[block.name] * block.parameters_per_unit for block in base.blocks)
    ratio /= budget_of(base).prunable_parameters  # what costs nothing goes, and no more
    if kind == "global":
        scores = {
            b.name: torch.cat([torch.zeros(free[b.name]), torch.ones(b.units - free[b.name])]) for b in base.blocks
        }
        kept = global_sort(base, ratio, allowed, scores)
    else:
        errors = {
            b.name: column(torch.cat([torch.zeros(free[b.name] + 1), torch.arange(1.0, b.units - free[b.name] + 1)]))
            for b in base.blocks
        }
        kept = by_error(base, ratio, allowed, errors)
    assert all(1 <= kept[block.name].units <= block.units for block in base.blocks)
    assert len({kept[block.name] for block in base.of_kind("attention")}) <= HEAD_SHAPES
    assert removed(base, kept) == pytest.approx(ratio, abs=0.002)


def test_head_shapes_are_limited_with_query_heads_and_protected_blocks_too():
    """Layers want ever larger attention; the fifth must keep all of its own."""
    base = anatomy(num_hidden_layers=9, num_attention_heads=16, num_key_value_heads=4)
    allowed = allowed_sizes(base, Target(), Limits(tuple(AXES), keep=["layers.4"]))
    errors = {}
    for block in base.blocks:
        units, members = (torch.arange(count).double() / block.units for count in (block.units + 1, block.members))
        errors[block.name] = (units[:, None].square() + members.square() / 3) * (block.layer + 1) ** 2
    groups = [(block,) for block in base.blocks]
    free = allocation._least_price(base, 0.4, allowed, partial(error_at, errors), groups)
    assert len(set(attention_of(base, free))) > HEAD_SHAPES
    kept = by_error(base, 0.4, allowed, errors)
    attention = attention_of(base, kept)
    assert attention[4] == Size(4, 4)
    assert len(set(attention)) <= HEAD_SHAPES
    assert len({size.members for size in attention}) > 1
    assert removed(base, kept) >= 0.4


def test_layers_that_differ_in_attention_may_lose_channels_alone():
    base = anatomy(num_hidden_layers=6, num_key_value_heads=8)
    sizes = {block.name: block.size if block.kind == "mlp" else Size(3 + block.layer) for block in base.blocks}
    base = base.keeping(sizes)
    kept = by_error(base, 0.2, allowed_sizes(base, Target(), Limits(("channels",))), random_errors(base, 0))
    assert attention_of(base, kept) == attention_of(base, sizes)
    assert removed(base, kept) >= 0.2


def attention_of(base, kept):
    return [kept[block.name] for block in base.of_kind("attention")]


def test_keep_highest_is_ascending_and_ties_go_to_the_lower_index():
    assert keep_highest(torch.tensor([1.0, 3.0, 2.0, 3.0, 3.0]), 2).tolist() == [1, 3]
