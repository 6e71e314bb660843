"""The plans that a search may try: their cost, and what a server can run."""

import random
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig

from numprune.allocation import by_error
from numprune.anatomy import read_anatomy
from numprune.axes import Limits
from numprune.blocks import Block
from numprune.budgeted import by_budgets, sizes_within
from numprune.byte_budget import ByteBudget
from numprune.options import PruneOptions
from numprune.quantization.allocation import Form, model_bytes
from numprune.search.space import Space, cost_and_limit, key
from numprune.slices import GONE, Size
from numprune.target import Target, allowed_sizes
from numprune.time_budget import TimeBudget
from numprune.timings import BlockTime, ScenarioTimes, Time

TARGET = Target(align=2)
QUERY_HEADS = ("kv-groups", "query-heads", "channels")


def anatomy_of(layers=4, **overrides):
    sizes = {
        "vocab_size": 50,
        "hidden_size": 64,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "max_position_embeddings": 32,
    }
    return read_anatomy(AutoConfig.for_model("llama", **(sizes | overrides)))


def random_errors(anatomy, seed, scale=1.0):
    """Of every block, rising with the units and members removed; `scale` multiplies those of attention."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for block in anatomy.blocks:
        rises = torch.rand(block.units, block.members, generator=generator).double() ** 2
        table = torch.cat([torch.zeros(1, block.members), rises]).cumsum(0)
        table[:, 1:] += torch.rand(block.members - 1, generator=generator).double().cumsum(0)
        weight = 0.5 + float(torch.rand((), generator=generator))
        found[block.name] = table / table.max() * weight * (scale if block.kind == "attention" else 1.0)
    return found


def space_of(anatomy, options, limits=None, seed=0, scale=1.0):
    """The space of these options, and the knapsack's plan in its middle."""
    errors = random_errors(anatomy, seed, scale)
    allowed = allowed_sizes(anatomy, options.target, limits or options.limits)
    if options.budgets:
        allowed = sizes_within(anatomy, options.budgets, allowed)
        found = by_budgets(anatomy, options.budgets, options.target, allowed, errors, {})
        start = {name: form.size for name, form in found.forms.items()}
    else:
        start = by_error(anatomy, options.ratio, allowed, errors)
    return Space.around(anatomy, start, allowed, errors, *cost_and_limit(anatomy, options)), start


def wander(space, start, steps=60, seed=0):
    """Yield plans: neighbours of neighbours."""
    draw, plan, seen = random.Random(seed), start, {key(start)}
    for _ in range(steps):
        found = space.neighbours(plan, 4, seen, draw)
        yield from found
        plan = found[-1]


def parameters(anatomy, plan):
    return sum(block.parameters(plan[block.name]) for block in anatomy.blocks)


@pytest.mark.parametrize("ratio", [0.25, 0.5])
@pytest.mark.parametrize("axes", [("channels",), QUERY_HEADS])
def test_every_candidate_meets_the_ratio_as_closely_as_its_sizes_allow(ratio, axes):
    anatomy = anatomy_of()
    options = PruneOptions(ratio, allocation="error", target=TARGET, axes=axes)
    space, start = space_of(anatomy, options)
    whole = parameters(anatomy, {block.name: block.size for block in anatomy.blocks})
    finest = min(block.parameters(Size(2)) for block in anatomy.of_kind("mlp"))
    plans = [*wander(space, start)]
    assert len({key(plan) for plan in plans}) == len(plans) > 100
    for plan in plans:
        removed = whole - parameters(anatomy, plan)
        assert removed >= ratio * whole
        grown_mlp = any(plan[name].units > start[name].units for name in plan if name.endswith("mlp"))
        if axes == ("channels",) and grown_mlp:
            assert parameters(anatomy, plan) == parameters(anatomy, start)  # equal costs are exchanged
        assert removed < ratio * whole + 8 * finest + max(block.parameters(Size(1, 2)) for block in anatomy.blocks)


def test_blocks_of_a_kind_exchange_equal_costs_and_others_what_pays():
    anatomy = anatomy_of()
    start = {block.name: Size(2, 2) if block.kind == "attention" else Size(48) for block in anatomy.blocks}
    channel, group = (anatomy.of_kind(kind)[0].parameters(Size(1, 2)) for kind in ("mlp", "attention"))
    unspent = channel  # less than a rung
    limit = parameters(anatomy, start) + unspent
    allowed = allowed_sizes(anatomy, TARGET, Limits())
    space = Space.around(anatomy, start, allowed, random_errors(anatomy, 0), Block.parameters, limit)
    plan = space.switched(start, "layers.0.mlp", "layers.3.mlp", 2)
    assert plan == {**start, "layers.0.mlp": Size(52), "layers.3.mlp": Size(44)}
    plan = space.switched(start, "layers.1.attention", "layers.0.mlp", 1)
    assert plan is not None
    assert plan["layers.1.attention"] == Size(3, 2)
    paid = 48 - plan["layers.0.mlp"].units
    assert paid * channel >= group - unspent > (paid - 2) * channel  # the fewest pairs of channels
    plan = space.switched(start, "layers.0.mlp", "layers.1.attention", 1)
    assert plan is not None
    assert plan["layers.1.attention"] == Size(1, 2)
    bought = plan["layers.0.mlp"].units - 48
    assert bought * channel <= group + unspent < (bought + 2) * channel  # the most


def test_nothing_grows_beyond_the_model_or_shrinks_to_less_than_is_allowed():
    anatomy = anatomy_of()
    space, start = space_of(anatomy, PruneOptions(0.4, allocation="error", target=TARGET))
    full = {**start, "layers.0.mlp": Size(96)}
    assert space.switched(full, "layers.0.mlp", "layers.1.mlp", 1) is None
    least = {**start, "layers.1.mlp": Size(2)}
    tight = replace(space, limit=space.cost(least))
    assert tight.switched(least, "layers.0.mlp", "layers.1.mlp", 1) is None


def test_a_ladder_has_no_rung_that_costs_and_loses_more_than_another():
    anatomy = anatomy_of()
    space, _ = space_of(anatomy, PruneOptions(0.4, allocation="error", target=TARGET, axes=QUERY_HEADS))
    errors = random_errors(anatomy, 0)
    for block in anatomy.blocks:
        ladder = space.ladders[block.name]
        costs = [rung.cost for rung in ladder]
        losses = [
            float(errors[block.name][block.units - size.units, block.members - size.members]) for _, size in ladder
        ]
        assert costs == sorted(costs)
        assert losses == sorted(losses, reverse=True)
        assert ladder[-1].size == block.size


def test_a_server_can_run_every_candidate():
    anatomy = anatomy_of(layers=8)
    limits = Limits(axes=QUERY_HEADS, skips=True)
    options = PruneOptions(0.6, allocation="error", target=TARGET, axes=QUERY_HEADS, skips=True)
    space, start = space_of(anatomy, options, limits, scale=0.01)
    plans = [*wander(space, start)]
    assert any(size == GONE for plan in plans for size in plan.values())
    for plan in plans:
        attention = [plan[block.name] for block in anatomy.of_kind("attention")]
        assert 1 <= len({size for size in attention if size.units}) <= 4
        assert any(plan[block.name].units for block in anatomy.of_kind("mlp"))


def test_attention_changes_sizes_even_if_it_has_all_that_a_server_allows():
    anatomy = anatomy_of(layers=24, num_key_value_heads=8)
    space, start = space_of(anatomy, PruneOptions(0.4, allocation="error", target=TARGET))
    attention = [block.name for block in anatomy.of_kind("attention")]
    used = {start[name] for name in attention}
    assert len(used) == 4 < len(space.ladders[attention[0]]) - 3  # and most steps lead to none of them
    plans = [*wander(space, start)]
    assert sum(any(plan[name] != start[name] for name in attention) for plan in plans) > len(plans) / 2
    assert all(len({plan[name] for name in attention}) <= 4 for plan in plans)


def test_a_budget_of_bytes_holds_for_every_candidate():
    anatomy = anatomy_of()
    whole = {block.name: Form(block.size, None) for block in anatomy.blocks}
    budget = ByteBudget(1, around=1000, value=2)
    budget = replace(budget, limit=round(0.6 * model_bytes(anatomy, whole, budget)))
    space, start = space_of(anatomy, PruneOptions(0.0, allocation="error", target=TARGET, budget=budget))
    for plan in wander(space, start):
        forms = {name: Form(size, None) for name, size in plan.items()}
        assert model_bytes(anatomy, forms, budget) <= budget.limit


@pytest.mark.parametrize("seed", range(3))
def test_a_budget_of_time_holds_for_every_candidate_whatever_the_times(seed):
    """Times that do not rise with the size, as of kernels that prefer some tiles."""
    anatomy, generator = anatomy_of(), torch.Generator().manual_seed(seed)
    blocks = {}
    for kind in anatomy.kinds:
        block = anatomy.of_kind(kind)[0]
        sizes = [size for size in allowed_sizes(anatomy, TARGET, Limits())[block.name] if size.units]
        ms = {size: 0.2 + size.units / block.units + float(torch.rand(1, generator=generator)) for size in sizes}
        blocks[kind] = [
            BlockTime(units=size.units, members=size.members, ms=value, interval95=(value, value))
            for size, value in ms.items()
        ]
    times = ScenarioTimes(scenario="decode,b=8,ctx=2048", around=Time(ms=1.0, interval95=(1.0, 1.0)), blocks=blocks)
    dense = TimeBudget(1, {64: times}, "torch").predicted(anatomy).ms
    budget = TimeBudget(0.7 * dense, {64: times}, "torch")
    space, start = space_of(anatomy, PruneOptions(0.0, allocation="error", target=TARGET, time_budget=budget))
    for plan in wander(space, start, steps=30):
        assert budget.predicted(anatomy.keeping(plan)).ms <= budget.limit_ms
