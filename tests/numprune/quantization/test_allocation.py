"""Sizes and bits in one budget of bytes: against brute force, against written files, and prices."""

import copy
import itertools
import json
import math
import re
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from numprune import knapsack, sensitivity
from numprune.allocation import by_error
from numprune.anatomy import read_anatomy
from numprune.axes import Limits
from numprune.budgeted import by_budgets
from numprune.byte_budget import LEVELS, MIXED, ByteBudget, parse
from numprune.calibration import Walker
from numprune.curves import error_at
from numprune.errors import InputError
from numprune.layers import ModelLayers
from numprune.option_checks import check_options
from numprune.options import PruneOptions
from numprune.planned import check_plan
from numprune.plans import Plan, read_plan
from numprune.pruning import plan_layers, prune
from numprune.quantization import Scheme, compressed_tensors, round_to_nearest
from numprune.quantization.allocation import (
    Form,
    block_bytes,
    levels_of,
    model_bytes,
    planned_schemes,
    price_of,
)
from numprune.quantization.pricing import rounding_prices
from numprune.quantization.walk import Fit, quantize_layers
from numprune.slices import Size
from numprune.target import Target, allowed_sizes

INT8, INT4 = Scheme("w8a8"), Scheme("w4a16", 32)
LEVELS_OF = [None, INT8, INT4]


def config(**overrides):
    sizes = {
        "vocab_size": 50,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "max_position_embeddings": 32,
    }
    return AutoConfig.for_model("llama", **(sizes | overrides))


def random_prices(anatomy, seed):
    """Of removals, which never fall and are not convex, and of rounding."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64).square()

    errors, rounding = {}, {}
    for block in anatomy.blocks:
        errors[block.name] = torch.cat([torch.zeros(1, 1), draw(block.units, 1)]).cumsum(0)
        int8 = float(draw(1)) / 10
        rounding[block.name] = {INT8: int8, INT4: int8 + float(draw(1))}
    return errors, rounding


def budget(limit=10**12, levels=MIXED, around=6400):
    return ByteBudget(limit, around, 2, LEVELS[levels])


def by_bytes(anatomy, within, allowed, errors, rounding):
    target = Target(align=32, quantization_group=32)
    return by_budgets(anatomy, [within], target, allowed, errors, rounding).forms


def price(anatomy, errors, rounding, forms):
    """The price of the forms, term by term."""
    total = 0.0
    for block in anatomy.blocks:
        size, level = forms[block.name].size, forms[block.name].level
        total += error_at(errors, block, size)
        if level:
            total += rounding[block.name][level] * size.units / block.units
    return total


@pytest.mark.parametrize("share", [0.2, 0.35, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_choice_is_the_cheapest_of_all_sizes_and_levels_within_the_budget(share, seed):
    anatomy = read_anatomy(config())
    errors, rounding = random_prices(anatomy, seed)
    allowed = allowed_sizes(anatomy, Target(align=32, quantization_group=32), Limits())
    options = [[Form(size, level) for size in allowed[block.name] for level in LEVELS_OF] for block in anatomy.blocks]
    names = [block.name for block in anatomy.blocks]
    whole = model_bytes(anatomy, {block.name: Form(block.size, None) for block in anatomy.blocks}, budget(around=0))
    within = budget(6400 + int(share * whole))
    every = [dict(zip(names, forms, strict=True)) for forms in itertools.product(*options)]
    least = min(
        price(anatomy, errors, rounding, forms)
        for forms in every
        if model_bytes(anatomy, forms, within) <= within.limit
    )
    found = by_bytes(anatomy, within, allowed, errors, rounding)
    assert model_bytes(anatomy, found, within) <= within.limit
    assert price(anatomy, errors, rounding, found) == pytest.approx(least, abs=1e-12)
    assert price_of(anatomy, found, errors, rounding) == pytest.approx(least, abs=1e-12)


def unlike():
    """Return an anatomy whose layers are of different widths."""
    whole = read_anatomy(config(intermediate_size=640, num_hidden_layers=3))
    widths = {"layers.0.mlp": Size(96), "layers.1.mlp": Size(224), "layers.2.mlp": Size(640)}
    return whole.keeping({block.name: widths.get(block.name, block.size) for block in whole.blocks})


def least_bytes(anatomy, levels, **changes):
    """The least bytes that can be chosen, as the refusal of one byte says them."""
    options = replace(OPTIONS, budget=budget(1, levels), **changes)
    with pytest.raises(InputError) as refused:
        check_options(anatomy, options)
    return int(re.search(r"take ([\d,]+);", str(refused.value))[1].replace(",", ""))


@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("levels", [MIXED, "none"])
@pytest.mark.parametrize("above", [1, 1.01, 1.3, 2])
def test_with_few_shares_by_bytes_ends_within_the_budget_and_near_the_cheapest(monkeypatch, above, levels, skips):
    """At the least bytes, and above them. Rounded down, each block's savings lose less than a share."""
    anatomy = unlike()
    errors, rounding = random_prices(anatomy, 0)
    allowed = allowed_sizes(anatomy, OPTIONS.target, Limits(skips=skips))
    least = least_bytes(anatomy, levels, skips=skips)
    limit = int(above * least)

    def choose(limit):
        forms = by_bytes(anatomy, budget(limit, levels), allowed, errors, rounding)
        assert model_bytes(anatomy, forms, budget()) <= limit
        return price(anatomy, errors, rounding, forms)

    whole = model_bytes(anatomy, {block.name: Form(block.size, None) for block in anatomy.blocks}, budget())
    stricter = max(limit - len(anatomy.blocks) * math.ceil((whole - limit) / 50), least)
    cheapest = choose(stricter)
    monkeypatch.setattr(knapsack, "_SHARES", 50)
    assert choose(limit) <= cheapest + 1e-9


def test_at_the_least_bytes_the_block_that_stays_is_one_that_fits():
    """The dearest MLP, which stays where the bytes allow it, cannot be as small as the first."""
    anatomy, target = unlike(), Target(align=256, quantization_group=32)
    allowed = allowed_sizes(anatomy, target, Limits(skips=True))
    errors = {block.name: torch.arange(block.units + 1).double()[:, None] for block in anatomy.blocks}
    rounding = {block.name: {INT8: 0.1, INT4: 0.2} for block in anatomy.blocks}
    least = least_bytes(anatomy, MIXED, skips=True, target=target)
    forms = by_bytes(anatomy, budget(least), allowed, errors, rounding)
    assert model_bytes(anatomy, forms, budget()) == least
    kept = [block.name for block in anatomy.blocks if forms[block.name].size.units]
    assert [name for name in kept if name.endswith("mlp")] == ["layers.0.mlp"]
    assert len(kept) == 2


@pytest.mark.parametrize("levels", ["none", "w8a8"])
@pytest.mark.parametrize("ratio", [0.2, 0.35, 0.5])
def test_with_the_same_bits_everywhere_sizes_are_those_of_the_ratio(levels, ratio):
    """At the bytes of what `by_error` chooses; rounding is free, since it would cost wider blocks more."""
    anatomy = read_anatomy(config())
    errors, _ = random_prices(anatomy, 0)
    allowed = allowed_sizes(anatomy, Target(align=32), Limits())
    of_budget = levels_of(budget(levels=levels), Target())
    free = {block.name: {level: 0.0 for level in of_budget if level} for block in anatomy.blocks}
    sizes = by_error(anatomy, ratio, allowed, errors)
    forms = {name: Form(size, of_budget[0]) for name, size in sizes.items()}
    within = budget(levels=levels)
    within = replace(within, limit=model_bytes(anatomy, forms, within))
    assert by_bytes(anatomy, within, allowed, errors, free) == forms


@pytest.mark.parametrize("level", LEVELS_OF)
def test_bytes_are_those_that_are_written(level):
    anatomy = read_anatomy(config())
    for block, size in zip(anatomy.blocks, [Size(1, 2), Size(64), Size(2, 2), Size(96)], strict=True):
        written = 0
        for name, shape in block.resized(size).tensors().items():
            value = torch.ones(shape, dtype=torch.bfloat16)
            if level and len(shape) == 2:
                stored = compressed_tensors.tensors_of(name, round_to_nearest(value.float(), level), torch.bfloat16)
                written += sum(tensor.nbytes for tensor in stored.values())
            else:
                written += value.nbytes
        assert block_bytes(block, Form(size, level), 2) == written


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config(), attn_implementation="sdpa")


ROWS = torch.randint(0, 50, (8, 16), generator=torch.Generator().manual_seed(0))
OPTIONS = PruneOptions(
    0.0,
    allocation="error",
    compensation="oneshot",
    target=Target(align=32, quantization_group=32),
    budget=budget(80_000),
)


@pytest.mark.parametrize("scheme", [INT8, INT4])
def test_prices_of_rounding_are_those_of_the_errors_at_the_blocks_outputs(model, scheme):
    """Against the outputs, collected with hooks, of a model of which one block alone is quantized."""
    layers = ModelLayers(model)
    gradients = sensitivity.measure(layers, ROWS)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = rounding_prices(Walker(layers, (16,)), ROWS, gradients.output, [INT8, INT4])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())

    def outputs(network, block):
        seen = []
        consumer = network.model.layers[block.layer].get_submodule(block.consumer)
        with torch.no_grad(), consumer.register_forward_hook(lambda _module, _args, output: seen.append(output)):
            network(ROWS)
        return seen[0].flatten(0, 1)

    for block in layers.anatomy.blocks:
        rounded = copy.deepcopy(model)
        quantize_layers(ModelLayers(rounded), {block.name: scheme}, lambda _matrices, _rest: None, Fit(ROWS))
        error = outputs(rounded, block) - outputs(model, block)
        expected = torch.einsum("ti,ij,tj->", error, gradients.output[block.name], error) / 2 / ROWS.numel()
        assert found[block.name][scheme] == pytest.approx(float(expected), rel=0.01)
        assert 4 * found[block.name][INT8] < found[block.name][INT4]


def test_a_plan_within_a_budget_says_sizes_and_schemes_and_is_followed(model, tmp_path):
    layers = ModelLayers(model)
    plan = plan_layers(layers, ROWS, OPTIONS)
    forms = {name: Form(size, planned_schemes(plan).get(name)) for name, size in plan.sizes().items()}
    assert model_bytes(layers.anatomy, forms, OPTIONS.budget) <= 80_000
    assert set(plan.schemes().values()) <= {"w8a8", "w4a16"}
    assert plan.schemes()
    plan.write(tmp_path / "plan.json")
    again = Plan.model_validate_json((tmp_path / "plan.json").read_text())
    assert again == plan
    check_plan(layers.anatomy, again)
    followed = prune(model, ROWS, OPTIONS, plan=again).plan
    assert (followed.sizes(), followed.schemes(), followed.budget) == (plan.sizes(), plan.schemes(), plan.budget)
    chosen = prune(model, ROWS, OPTIONS).plan
    assert (chosen.sizes(), chosen.schemes()) == (plan.sizes(), plan.schemes())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"scheme": "fp8"}, "layers.0.mlp has scheme fp8, which is not among the budget's levels: none, w8a8, w4a16"),
        ({"kept": [], "scheme": "w8a8"}, "layers.0.mlp has scheme w8a8, and keeps no unit"),
        (
            {"kept": [*range(96)], "scheme": None},
            r"its sizes and schemes take \d\d,\d+ bytes, and its budget is 20,000",
        ),
    ],
)
def test_edited_schemes_must_fit_the_budget(model, change, says):
    layers = ModelLayers(model)
    plan = plan_layers(layers, ROWS, replace(OPTIONS, skips=True, budget=budget(20_000)))
    check_plan(layers.anatomy, plan)
    edited = plan.blocks | {"layers.0.mlp": plan.blocks["layers.0.mlp"].model_copy(update=change)}
    with pytest.raises(InputError, match=says):
        check_plan(layers.anatomy, plan.model_copy(update={"blocks": edited}))


def test_edited_schemes_need_a_budget(model):
    layers = ModelLayers(model)
    plan = plan_layers(layers, ROWS, OPTIONS)
    with pytest.raises(InputError, match=r"has scheme w.a.*, and the plan has no budget"):
        check_plan(layers.anatomy, plan.model_copy(update={"budget": None}))


@pytest.mark.parametrize("change", [{"value": 3}, {"around": -5}, {"limit": 0}, {"levels": []}])
def test_edited_budgets_are_refused_by_field(model, tmp_path, change):
    data = plan_layers(ModelLayers(model), ROWS, OPTIONS).model_dump(mode="json")
    data["budget"] |= change
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match=rf"is not valid: budget\.{next(iter(change))}"):
        read_plan(tmp_path / "plan.json")


def test_a_plan_without_a_budget_has_no_word_of_it(model):
    plan = plan_layers(ModelLayers(model), ROWS, replace(OPTIONS, ratio=0.3, budget=None))
    assert not {"budget", "scheme"} & {*plan.model_dump(), *plan.model_dump()["blocks"]["layers.0.mlp"]}
    assert '"scheme"' not in plan.model_dump_json()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"ratio": 0.3}, "ratio is 0.3, and a budget is given"),
        ({"allocation": "uniform"}, "a budget is divided by error; allocation is 'uniform'"),
        ({"drop_layers": 1, "budget": budget(7000)}, "with drop_layers 1: the budget is 7,000 bytes, but embeddings"),
        ({"compensation": "bias"}, "compensation bias adds tensors that a budget does not count"),
        ({"target": Target(align=32)}, "quantization_group is 1; for blocks in w4a16 it must be one of 32, 64, 128"),
        ({"target": Target(quantization_group=128)}, "128, which does not divide the model's hidden_size 64"),
        (
            {"budget": budget(9000)},
            r"budget is 9,000 .* precision, w8a8 or w4a16 \(groups of 32\) take 2\d,\d+; .* or a smaller align",
        ),
        ({"budget": budget(9000, "w8a8")}, r"block in w8a8 take 4\d,\d+; allow more bytes, or fewer bits"),
        ({"budget": budget(9000), "skips": True}, r"take 1\d,\d+"),
        ({"budget": budget(10**6)}, r"the model takes [\d,]+ bytes as it is: nothing has to go"),
    ],
)
def test_budgets_that_make_no_sense_are_refused(change, says):
    with pytest.raises(InputError, match=says):
        check_options(read_anatomy(config()), replace(OPTIONS, **change))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("6GiB", 6 << 30), ("1.5 GB", 1_500_000_000), (" 12MiB ", 12 << 20), ("80000B", 80_000), ("1TB", 10**12)],
)
def test_budgets_are_bytes(text, expected):
    assert parse(text) == expected


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("20ms@decode,b=8,ctx=2048", "is a time"),
        ("1500tok/s@decode", "is a throughput"),
        ("kv=64KiB/token", "is the bytes of the KV cache"),
        ("0.3", "is a ratio, which has an option of its own"),
        ("30%", "is a ratio"),
        ("0GiB", "bytes of weights over 0"),
        ("6", "is a ratio"),
        ("6 gigabytes", "a number with B, KB, MB"),
        ("", "a number with"),
        (f"{10**400}TB", "bytes of weights over 0"),
    ],
)
def test_other_budgets_are_refused_by_their_kind(text, kind):
    with pytest.raises(InputError, match=kind):
        parse(text)
