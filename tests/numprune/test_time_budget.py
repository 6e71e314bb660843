"""Budgets of time on synthetic tables: the choice against brute force, and what is refused."""

import itertools
import math
import re
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig

from numprune.allocation import by_error
from numprune.anatomy import read_anatomy
from numprune.axes import Limits
from numprune.budget_texts import parse_budgets
from numprune.budgeted import by_budgets
from numprune.curves import error_at
from numprune.errors import InputError
from numprune.option_checks import check_options
from numprune.options import PruneOptions
from numprune.planned import check_plan
from numprune.plans import read_plan
from numprune.pruning import prune
from numprune.scenario import RULE, Scenario, check_scenario, parse_scenario, parse_time
from numprune.served import AS_STORED
from numprune.slices import Size
from numprune.target import Target, allowed_sizes
from numprune.time_budget import TimeBudget, measured_sizes
from numprune.timings import (
    BlockTime,
    Key,
    ScenarioTimes,
    Time,
    TimingTable,
    check_key,
    read_timings,
    shape_of,
    sizes_to_time,
)
from tests.conftest import build_tiny, tiny_config

TARGET = Target(align=16)
DECODE = "decode,b=8,ctx=2048"
ARCHITECTURES = {"bert": ["BertForMaskedLM"], "vit": ["ViTForImageClassification"]}


def config(family="llama", **overrides):
    sizes = {
        "vocab_size": 50,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "max_position_embeddings": 32,
    }
    return AutoConfig.for_model(family, **(sizes | overrides))


ANATOMY = read_anatomy(config())
ALLOWED = allowed_sizes(ANATOMY, TARGET, Limits())


def exactly(ms):
    return {"ms": ms, "interval95": (ms, ms)}


def table(cost, around=1.0, anatomy=ANATOMY, allowed=ALLOWED):
    """Times of all allowed sizes; `cost`: block and size -> milliseconds."""
    blocks = {}
    for kind in anatomy.kinds:
        block = anatomy.of_kind(kind)[0]
        blocks[kind] = [
            BlockTime(units=size.units, members=size.members, **exactly(cost(block, size)))
            for size in allowed[block.name]
            if size.units
        ]
    return ScenarioTimes(scenario=DECODE, around=Time(**exactly(around)), blocks=blocks)


def random_table(seed):
    """Neither convex nor monotone."""
    generator = torch.Generator().manual_seed(seed)
    return table(lambda block, size: 0.2 + float(torch.rand(1, generator=generator)))


def random_errors(seed, anatomy=ANATOMY):
    generator = torch.Generator().manual_seed(seed)
    rises = {block.name: torch.rand(block.units, 1, generator=generator).double() ** 2 for block in anatomy.blocks}
    return {name: torch.cat([torch.zeros(1, 1), rise]).cumsum(0) for name, rise in rises.items()}


def by_time(anatomy, budget, allowed, errors):
    found = by_budgets(anatomy, [budget], TARGET, allowed, errors, {})
    return {name: form.size for name, form in found.forms.items()}


def price(errors, sizes):
    return math.fsum(error_at(errors, block, sizes[block.name]) for block in ANATOMY.blocks)


def milliseconds(times, sizes):
    return TimeBudget(1, {64: times}, "torch").predicted(ANATOMY.keeping(sizes)).ms


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_the_choice_is_the_cheapest_of_all_within_the_budget(seed, share):
    times, errors = random_table(seed), random_errors(seed)
    names = [block.name for block in ANATOMY.blocks]
    every = [dict(zip(names, sizes, strict=True)) for sizes in itertools.product(*(ALLOWED[name] for name in names))]
    found = sorted(milliseconds(times, sizes) for sizes in every)
    limit = found[0] + share * (milliseconds(times, {b.name: b.size for b in ANATOMY.blocks}) - found[0])
    chosen = by_time(ANATOMY, TimeBudget(limit, {64: times}, "torch"), ALLOWED, errors)
    assert milliseconds(times, chosen) <= limit
    best = min(price(errors, sizes) for sizes in every if milliseconds(times, sizes) <= limit - 1e-5)
    assert price(errors, chosen) <= best


def test_twice_the_times_and_the_budget_give_the_same_sizes():
    times, errors = random_table(0), random_errors(0)
    doubled = table(lambda block, size: 2 * next(t.ms for t in times.blocks[block.kind] if t.size == size), around=2.0)
    limit = 0.8 * milliseconds(times, {block.name: block.size for block in ANATOMY.blocks})
    once = by_time(ANATOMY, TimeBudget(limit, {64: times}, "torch"), ALLOWED, errors)
    assert by_time(ANATOMY, TimeBudget(2 * limit, {64: doubled}, "torch"), ALLOWED, errors) == once
    assert once != {block.name: block.size for block in ANATOMY.blocks}
    corrected = TimeBudget(2 * limit, {64: times}, "torch").corrected(2)
    assert by_time(ANATOMY, corrected, ALLOWED, errors) == once


@pytest.mark.parametrize("ratio", [0.2, 0.4, 0.6])
def test_times_proportional_to_parameters_give_the_sizes_of_a_ratio(ratio):
    errors = random_errors(1)
    whole = sum(block.parameters(block.size) for block in ANATOMY.blocks)
    times = table(lambda block, size: block.parameters(size) * 1e-3)
    budget = TimeBudget(1.0 + (1 - ratio) * whole * 1e-3 + 1e-5, {64: times}, "torch")
    assert by_time(ANATOMY, budget, ALLOWED, errors) == by_error(ANATOMY, ratio, ALLOWED, errors)


def test_a_block_that_may_go_takes_no_time():
    allowed = allowed_sizes(ANATOMY, TARGET, Limits(skips=True))
    times = table(lambda block, size: 1.0)  # no size is quicker than another
    chosen = by_time(ANATOMY, TimeBudget(4.5, {64: times}, "torch"), allowed, random_errors(2))
    assert sorted(size.units > 0 for size in chosen.values()) == [False, True, True, True]


def test_only_measured_sizes_are_chosen():
    times = table(lambda block, size: 1e-3 * block.parameters(size))
    times.blocks["mlp"][:] = [time for time in times.blocks["mlp"] if time.units in (32, 64)]
    budget = TimeBudget(0.7 * milliseconds(times, {b.name: b.size for b in ANATOMY.blocks}), {64: times}, "torch")
    measured = measured_sizes(ANATOMY, ALLOWED, budget)
    assert measured["layers.0.mlp"] == [Size(32), Size(64)]
    chosen = by_time(ANATOMY, budget, measured, random_errors(0))
    assert {chosen[block.name] for block in ANATOMY.of_kind("mlp")} <= {Size(32), Size(64)}
    wider = read_anatomy(config(intermediate_size=80))
    with pytest.raises(InputError, match=r"layers\.0\.mlp has 80, and the table has mlp of 32, 64 units"):
        budget.check_measured(wider)


@pytest.mark.parametrize(
    ("limit", "changes", "says"),
    [
        (5.0, {}, "takes 5 ms as it is: nothing has to go"),
        (1.5, {}, "quickest measured size of every block take 5 ms of 5 ms"),
        (4.0, {"ratio": 0.3}, "ratio is 0.3, and a budget is given"),
        (4.0, {"allocation": "uniform"}, "a budget is divided by error"),
        (1.5, {"drop_layers": 1}, r"with drop_layers 1: the budget is 1.5 ms@.* take 3 ms of 3 ms"),
    ],
)
def test_budgets_that_cannot_be_met_are_refused(limit, changes, says):
    budget = TimeBudget(limit, {64: table(lambda block, size: 1.0)}, "torch")
    options = PruneOptions(ratio=0.0, allocation="error", target=TARGET, time_budget=budget)
    with pytest.raises(InputError, match=says):
        check_options(ANATOMY, replace(options, **changes))


def test_the_plan_has_the_budget_and_is_held_to_it(tiny_model, tmp_path):
    model = tiny_model()
    anatomy = read_anatomy(model.config)
    allowed = allowed_sizes(anatomy, Target(), Limits())
    times = table(lambda block, size: 1e-3 * block.parameters(size), anatomy=anatomy, allowed=allowed)
    whole = TimeBudget(1, {64: times}, "torch").predicted(anatomy).ms
    budget = TimeBudget(0.7 * whole, {64: times}, "torch")
    rows = torch.randint(0, anatomy.vocabulary, (4, 16), generator=torch.Generator().manual_seed(0))
    made = prune(model, rows, PruneOptions(ratio=0.0, allocation="error", time_budget=budget))
    assert 0.5 * whole < budget.predicted(read_anatomy(made.model.config)).ms <= 0.7 * whole
    made.plan.write(tmp_path / "plan.json")
    plan = read_plan(tmp_path / "plan.json")
    assert plan.time_budget == budget
    check_plan(anatomy, plan)
    tighter = plan.model_copy(update={"time_budget": replace(budget, limit_ms=0.4 * whole)})
    with pytest.raises(InputError, match=r"its sizes take .* ms, and its budget is .* ms@decode"):
        check_plan(anatomy, tighter)


def test_blocks_of_one_size_share_the_error_of_their_time():
    times = ScenarioTimes(
        scenario=DECODE,
        around=Time(ms=1, interval95=(1, 1)),
        blocks={
            "attention": [BlockTime(ms=2, interval95=(1, 4), units=2, members=2)],
            "mlp": [BlockTime(ms=3, interval95=(3, 3.5), units=64, members=1)],
        },
    )
    found = TimeBudget(1, {64: times}, "torch", correction=2.0).predicted(ANATOMY)
    assert found.ms == pytest.approx(2 * (1 + 2 * 2 + 2 * 3))
    assert found.interval95 == pytest.approx((2 * (11 - 2), 2 * (11 + math.hypot(4, 1))))


@pytest.mark.parametrize(
    ("text", "ms"),
    [
        ("20ms@decode,b=8,ctx=2048", 20),
        ("0.5 s@prefill, b=2, len=128", 500),
        ("250us@decode,b=1,ctx=1", 0.25),
        ("1600tok/s@decode,b=8,ctx=2048", 5),
        ("1000tok/s@prefill,b=2,len=100", 200),
        ("1000tok/s@forward,b=2,len=100", 200),
        ("1000tok/s@request,b=2,len=100,out=50", 100),
        ("5ms@forward,b=8", 5),
    ],
)
def test_times_and_throughputs_are_read(text, ms):
    found = parse_time(text)
    assert (found.ms, found.speedup) == (pytest.approx(ms), None)
    assert parse_scenario(str(found.scenario)) == found.scenario


def test_a_speedup_is_over_the_dense_model():
    limit = parse_time(f"1.25x@{DECODE}")
    assert (limit.ms, limit.speedup, str(limit.scenario)) == (None, 1.25, DECODE)
    times = random_table(0)
    unknown = TimeBudget.of(limit, {}, "torch", AS_STORED)
    assert str(unknown) == "1.25x"
    budget = TimeBudget.of(limit, {64: times}, "torch", AS_STORED).resolved(ANATOMY)
    dense = milliseconds(times, {block.name: block.size for block in ANATOMY.blocks})
    assert budget.limit_ms == pytest.approx(dense / 1.25)
    assert str(budget) == f"1.25x@{DECODE}"
    with pytest.raises(InputError, match="hidden size 64 was not measured; measured are 32"):
        TimeBudget.of(limit, {32: times}, "torch", AS_STORED).resolved(ANATOMY)
    with pytest.raises(InputError, match="the model is that fast already; ask for more than 1x"):
        parse_time(f"1x@{DECODE}")


def test_a_scenario_says_its_step():
    assert parse_scenario("decode,b=8,ctx=2048") == Scenario("decode", 8, 2048)
    assert parse_scenario("prefill,b=2,len=16").tokens_per_step == 32
    request = parse_scenario("request,b=2,len=16,out=9")
    assert request == Scenario("request", 2, 16, 9)
    assert (str(request), request.tokens_per_step) == ("request,b=2,len=16,out=9", 18)
    assert [(str(step), count) for step, count in request.steps()] == [
        ("prefill,b=2,len=16", 1),
        ("decode,b=2,ctx=19", 8),
    ]
    for text in ("request,b=2,len=16", "request,b=2,len=16,out=1", "prefill,b=2,len=16,out=0"):
        with pytest.raises(InputError, match="out, at least 2, is the length of the answers of a request"):
            parse_scenario(text)


@pytest.mark.parametrize(
    ("family", "scenario", "rule"),
    [
        ("llama", "forward,b=1,len=8", "decode,b=BATCH,ctx=TOKENS, prefill"),
        ("bert", "prefill,b=1,len=8", "for the task masked-lm it must be forward,b=BATCH,len=TOKENS"),
        ("bert", "forward,b=1", "it must be forward,b=BATCH,len=TOKENS"),
        ("vit", "forward,b=1,len=8", "for the task image-classification it must be forward,b=BATCH$"),
    ],
)
def test_scenarios_are_those_of_the_task(family, scenario, rule):
    anatomy = read_anatomy(tiny_config(family, architectures=ARCHITECTURES.get(family)))
    with pytest.raises(InputError, match=rule):
        check_scenario(parse_scenario(scenario), anatomy, 8)


def test_images_have_no_tokens_per_second():
    with pytest.raises(InputError, match="images have no tokens; give a time"):
        parse_time("100tok/s@forward,b=8")


@pytest.mark.parametrize(
    "text",
    [
        "20ms@",
        "20ms",
        "1.3x",
        "20@decode,b=1,ctx=1",
        "0ms@decode,b=1,ctx=1",
        "5ms@decode,b=0,ctx=4",
        "5ms@prefill,b=1,ctx=4",
        "5ms@decode,b=1",
        "5ms@request,b=1,ctx=4,out=4",
    ],
)
def test_other_texts_are_refused_with_the_rule(text):
    with pytest.raises(InputError, match=re.escape(f"{RULE}; for encoders")):
        parse_budgets([text])


def test_a_speedup_is_written_with_either_sign():
    assert parse_budgets([f"1.3\N{MULTIPLICATION SIGN}@{DECODE}"]).time == f"1.3\N{MULTIPLICATION SIGN}@{DECODE}"
    assert parse_time(f"1.3\N{MULTIPLICATION SIGN}@{DECODE}") == parse_time(f"1.3x@{DECODE}")


KEY = Key(
    runtime="torch",
    versions={"torch": "2.13"},
    device="EPYC",
    threads=2,
    dtype="float32",
    quantization="none",
    tensor_parallel=1,
    shape=shape_of(ANATOMY),
)


def test_a_table_of_something_else_is_refused_with_both_values(tmp_path):
    found = TimingTable(key=KEY, copies={"mlp": 2}, visits=3, drift={DECODE: 1.0}, scenarios=[random_table(0)])
    (tmp_path / "table.json").write_text(found.to_json())
    assert read_timings(tmp_path / "table.json") == found
    check_key(found, KEY)
    shape = KEY.shape.model_copy(update={"hidden_size": 128, "sliding_window": 4096})
    here = KEY.model_copy(update={"versions": {"torch": "2.14"}, "device": "Xeon", "shape": shape})
    with pytest.raises(InputError) as refused:
        check_key(found, here)
    for difference in (
        "versions.torch is 2.13 in the table and 2.14",
        "device is EPYC",
        "hidden_size is 64",
        "sliding_window is None in the table and 4096",
    ):
        assert difference in str(refused.value)
    with pytest.raises(InputError, match=rf"ctx=1 was not measured; measured are {DECODE}"):
        found.times("decode,b=8,ctx=1")
    (tmp_path / "table.json").write_text(found.to_json().replace('"runtime": "torch"', '"runtime": "abacus"'))
    with pytest.raises(InputError, match=r"key\.runtime: .*torch\|onnxruntime"):
        read_timings(tmp_path / "table.json")
    (tmp_path / "table.json").write_text("{}")
    with pytest.raises(InputError, match="not a table of numprune timings"):
        read_timings(tmp_path / "table.json")


def test_sizes_are_spread_and_include_the_model_s_own():
    anatomy = read_anatomy(config(intermediate_size=1000, num_key_value_heads=4))
    sizes = sizes_to_time(anatomy, TARGET, 5)
    assert [size.units for size in sizes["mlp"]] == [192, 400, 592, 800, 1000]
    assert [size.units for size in sizes["attention"]] == [1, 2, 3, 4]


def test_a_plan_without_a_layer_is_followed_where_whole_layers_were_timed():
    layers = ["sliding_attention", "full_attention"] * 2
    model = build_tiny("gemma3_text", num_hidden_layers=4, layer_types=layers)
    anatomy = read_anatomy(model.config)
    allowed = allowed_sizes(anatomy, TARGET, Limits())
    blocks = {
        block.timed_as: [
            BlockTime(units=size.units, members=size.members, ms=ms, interval95=(ms, ms))
            for size in allowed[block.name]
            if (ms := 1e-3 * block.parameters(size))
        ]
        for block in anatomy.blocks
    }
    times = ScenarioTimes(scenario=DECODE, around=Time(ms=1, interval95=(1, 1)), blocks=blocks, within_layers=True)
    limit_ms = 0.6 * TimeBudget(1.0, {64: times}, "torch").predicted(anatomy).ms
    budget = TimeBudget(limit_ms, {64: times}, "torch")
    options = PruneOptions(0.0, "magnitude", "error", "oneshot", target=TARGET, time_budget=budget, drop_layers=1)
    plan = prune(model, torch.randint(0, 200, (8, 12)), options).plan
    check_plan(anatomy, plan)
    assert budget.predicted(plan.result(anatomy)).ms <= limit_ms
    with pytest.raises(InputError, match=r"its sizes take .* ms, and its budget is"):
        check_plan(anatomy, plan.model_copy(update={"time_budget": replace(budget, limit_ms=0.5 * limit_ms)}))
