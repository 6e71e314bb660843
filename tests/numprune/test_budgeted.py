"""Several budgets at once on synthetic tables: the choice against brute force, and what is refused."""

import itertools
import re
from dataclasses import replace

import pytest
import torch

from numprune.anatomy import read_anatomy
from numprune.budget import budget_of
from numprune.budget_texts import Asked, parse_budgets
from numprune.budgeted import by_budgets
from numprune.byte_budget import ByteBudget
from numprune.cache_budget import KvBudget, parse_kv
from numprune.errors import InputError
from numprune.learning import check_learning
from numprune.option_checks import check_options
from numprune.options import PruneOptions, options_of
from numprune.planned import check_plan
from numprune.plans import read_plan
from numprune.pruning import prune
from numprune.quantization.allocation import Form, model_bytes
from numprune.target import Target
from numprune.time_budget import TimeBudget
from tests.numprune.test_time_budget import ALLOWED, ANATOMY, TARGET, milliseconds, price, random_errors, table

WHOLE = {block.name: block.size for block in ANATOMY.blocks}


def byte_budget(limit):
    return ByteBudget(limit, 6400, 2)


def weight_bytes(sizes):
    return model_bytes(ANATOMY, {name: Form(size, None) for name, size in sizes.items()}, byte_budget(1))


def times_against_bytes(seed):
    """Times that are independent of the bytes: sizes that save much of one save little of the other."""
    generator = torch.Generator().manual_seed(seed)
    return table(lambda block, size: 0.2 + float(torch.rand(1, generator=generator)))


def every_choice():
    names = [block.name for block in ANATOMY.blocks]
    return [dict(zip(names, sizes, strict=True)) for sizes in itertools.product(*(ALLOWED[name] for name in names))]


def budgets_of(times, bytes_share, time_share):
    """Budgets that leave these shares between the least and the whole of bytes and time."""
    every = every_choice()
    found = []
    for cost, share in ((weight_bytes, bytes_share), (lambda sizes: milliseconds(times, sizes), time_share)):
        least, whole = min(map(cost, every)), cost(WHOLE)
        found.append(least + share * (whole - least))
    return [byte_budget(int(found[0])), TimeBudget(found[1], {64: times}, "torch")]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shares", [(0.6, 0.6), (0.8, 0.4)])
def test_the_choice_is_within_all_budgets_and_the_stated_gap(seed, shares):
    times, errors = times_against_bytes(seed), random_errors(seed)
    budgets = budgets_of(times, *shares)

    def is_within(sizes, spare=0.0):
        return weight_bytes(sizes) <= budgets[0].limit and milliseconds(times, sizes) <= budgets[1].limit_ms - spare

    possible = [sizes for sizes in every_choice() if is_within(sizes, 1e-5)]
    found = by_budgets(ANATOMY, budgets, TARGET, ALLOWED, errors, {})
    sizes = {name: form.size for name, form in found.forms.items()}
    assert is_within(sizes)
    assert found.price == pytest.approx(price(errors, sizes))
    cheapest = min(price(errors, other) for other in possible)
    assert found.bound <= cheapest * (1 + 1e-9)
    assert found.price <= cheapest * 1.1
    doubled = [budgets[0], TimeBudget(2 * budgets[1].limit_ms, {64: times}, "torch", correction=2.0)]
    assert by_budgets(ANATOMY, doubled, TARGET, ALLOWED, errors, {}).forms == found.forms


def test_a_budget_that_is_met_anyway_changes_nothing():
    times, errors = times_against_bytes(0), random_errors(0)
    bytes_, time = budgets_of(times, 0.4, 0.4)
    for binding, slack in ((bytes_, replace(time, limit_ms=100.0)), (time, byte_budget(10**9))):
        alone = by_budgets(ANATOMY, [binding], TARGET, ALLOWED, errors, {})
        assert by_budgets(ANATOMY, [binding, slack], TARGET, ALLOWED, errors, {}).forms == alone.forms


def test_budgets_that_cannot_be_met_together_are_refused_with_the_least_of_each():
    times = times_against_bytes(1)
    bytes_, time = budgets_of(times, 0.02, 0.02)
    options = PruneOptions(0.0, allocation="error", target=TARGET, budget=bytes_, time_budget=time)
    for alone in (replace(options, time_budget=None), replace(options, budget=None)):
        check_options(ANATOMY, alone)
    with pytest.raises(InputError, match="no sizes were found that meet all of it") as refused:
        check_options(ANATOMY, options)
    said = re.findall(r"with ([\d.,]+) (?:ms|bytes), at least ([\d.,]+) (ms|bytes)", str(refused.value))
    assert {unit for *_, unit in said} == {"ms", "bytes"}
    for _, least, unit in said:
        amount = float(least.replace(",", ""))
        if unit == "bytes":  # exactly that many are enough
            check_options(ANATOMY, replace(options, budget=byte_budget(int(amount))))
        else:
            assert amount > time.limit_ms


def test_a_budget_of_kv_cache_removes_kv_groups_only(tiny_model, tmp_path):
    model = tiny_model()
    anatomy = read_anatomy(model.config)
    whole = budget_of(anatomy).kv_bytes_per_token
    rows = torch.randint(0, anatomy.vocabulary, (4, 16), generator=torch.Generator().manual_seed(0))
    options = PruneOptions(0.0, allocation="error", kv_budget=KvBudget(int(0.8 * whole), 4))
    made = prune(model, rows, options)
    after = read_anatomy(made.model.config)
    assert 0.5 * whole <= budget_of(after).kv_bytes_per_token <= 0.8 * whole
    assert [block.size for block in after.of_kind("mlp")] == [block.size for block in anatomy.of_kind("mlp")]
    made.plan.write(tmp_path / "plan.json")
    plan = read_plan(tmp_path / "plan.json")
    assert plan == made.plan
    assert options_of(plan).kv_budget == options.kv_budget
    check_plan(anatomy, plan)
    with pytest.raises(InputError, match=r"its sizes take [\d,]+, and its budget is 256 bytes of KV cache per token"):
        check_plan(anatomy, plan.model_copy(update={"kv_budget": KvBudget(256, 4)}))


def test_bits_and_kv_cache_in_one_plan(tiny_model):
    model = tiny_model()
    anatomy = read_anatomy(model.config)
    forms = {block.name: Form(block.size, None) for block in anatomy.blocks}
    whole, kv = model_bytes(anatomy, forms, ByteBudget(1, 1000, 4)), budget_of(anatomy).kv_bytes_per_token
    target = Target(align=32, quantization_group=32)
    options = PruneOptions(
        *(0.0, "obs", "error", "oneshot", target),
        budget=ByteBudget(int(0.5 * whole), 1000, 4, (None, "w8a8", "w4a16")),
        kv_budget=KvBudget(int(0.8 * kv), 4),
    )
    rows = torch.randint(0, anatomy.vocabulary, (4, 16), generator=torch.Generator().manual_seed(0))
    plan = prune(model, rows, options).plan
    check_plan(anatomy, plan)
    assert plan.schemes()
    assert plan.price is not None
    assert plan.price.bound_nats_per_token <= plan.price.nats_per_token
    assert len(plan.limits) == 2


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kv_budget": KvBudget(10**9, 4)}, "nothing has to go"),
        ({"kv_budget": KvBudget(1, 4)}, "the smallest allowed attention of every layer takes"),
        ({"kv_budget": KvBudget(300, 4), "ratio": 0.2}, "ratio is 0.2, and a budget is given"),
        (
            {"kv_budget": KvBudget(300, 4), "budget": byte_budget(60_000), "refine": "search"},
            "the search keeps within one budget",
        ),
    ],
)
def test_budgets_that_make_no_sense_are_refused(changes, says):
    options = PruneOptions(0.0, allocation="error", target=TARGET)
    with pytest.raises(InputError, match=says):
        check_options(ANATOMY, replace(options, **changes))


def test_masks_are_trained_for_one_budget():
    options = PruneOptions(0.0, "vib", "error", target=TARGET, budget=byte_budget(60_000))
    for changes, says in (
        ({"kv_budget": KvBudget(300, 4)}, "not trained for a budget of KV cache"),
        ({"time_budget": budgets_of(times_against_bytes(0), 0.5, 0.5)[1]}, "several are given"),
    ):
        with pytest.raises(InputError, match=says):
            check_learning(ANATOMY, replace(options, **changes), "bytes")


def test_budgets_are_read():
    texts = ["20ms@decode,b=8,ctx=2048", "6GiB", "kv = 64KiB/token"]
    assert parse_budgets(texts) == Asked(6 << 30, texts[0], 64 << 10)
    assert parse_budgets([]) == Asked()
    with pytest.raises(InputError, match="'6GiB' and '7GiB' limit the same quantity"):
        parse_budgets(["6GiB", "7GiB"])
    for text in ("kv=64KiB", "kv=/token", "kv=0B/token", "kv=1.5/token"):
        with pytest.raises(InputError, match=re.escape("must be kv=SIZE/token, like kv=64KiB/token")):
            parse_kv(text)


def test_an_encoder_has_no_kv_cache(tiny_model):
    anatomy = read_anatomy(tiny_model("bert").config)
    options = PruneOptions(0.0, allocation="error", kv_budget=KvBudget(100, 4))
    with pytest.raises(InputError, match="this masked-lm model has no KV cache"):
        check_options(anatomy, options)
