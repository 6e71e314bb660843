"""A budget of bytes on the command line and in a recipe: sizes and bits are chosen, written, and within it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from numprune.anatomy import read_anatomy
from numprune.budget import budget_of
from numprune.byte_budget import LEVELS
from numprune.errors import InputError
from numprune.export import checkpoint, manifest
from numprune.flows.forecast import forecast, text
from numprune.flows.recipe import load
from numprune.flows.steps.prune import byte_budget
from numprune.flows.steps.reference_answers import answers_of
from numprune.plans import PLAN_FILE, read_plan
from numprune.serving import report as reports
from tests.conftest import build_tiny, recast
from tests.flows.conftest import RECIPE, Answered, write_inputs
from tests.flows.faults import finish

Command = Callable[..., Answered]
SAMPLED = ("--samples", 8, "--sequence-length", 64)
MIXED = '[quantize]\nscheme = "mixed"\ngroup_size = 32\n'


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in bfloat16 and its text, as of `write_inputs`, with a recipe within a budget; not to be written to."""
    folder = write_inputs(tmp_path_factory.mktemp("budget"), build_tiny().bfloat16(), RECIPE + MIXED)
    recast(folder / "base", torch.bfloat16)
    recipe = (folder / "recipe.toml").read_text().replace("ratio = 0.25", f'budget = "{limit(folder, 0.35)}B"')
    recipe = recipe.replace('runtimes = ["onnxruntime"]', 'runtimes = ["torch"]') + '[export]\ntargets = ["vllm"]\n'
    recipe = recipe.replace('"sizes.parameters.ratio"', '"sizes.weight_bytes.ratio"')  # fewer bits may be all it takes
    (folder / "recipe.toml").write_text(recipe)
    return folder


def limit(folder: Path, share: float) -> int:
    """The bytes that leave this share of those of the layers."""
    around = byte_budget(folder / "base", 0, "none").around
    return around + int(share * (checkpoint.weight_bytes(folder / "base") - around))


def test_copies_and_buffers_that_pruning_does_not_write_take_nothing_of_a_budget(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    folder = tiny_checkpoint("gpt2", tie_word_embeddings=True)
    around = byte_budget(folder, 0, "none").around
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 256, 256)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert byte_budget(folder, 0, "none").around == around


def test_the_quantized_result_is_within_the_budget_and_follows_the_plan(
    numprune: Command, inputs: Path, tmp_path: Path
) -> None:
    base, text, bytes_allowed = inputs / "base", ("--text", inputs / "train.txt"), limit(inputs, 0.35)
    asked = ("--budget", f"{bytes_allowed}B", "--scheme", "mixed", "--quantization-group", 32, "--align", 32, *SAMPLED)
    pruned = numprune("prune", base, tmp_path / "pruned", *asked, *text, "--json")
    assert pruned.code == 0, pruned.err
    plan = read_plan(tmp_path / "pruned" / PLAN_FILE)
    assert pruned.json["schemes"] == plan.schemes() != {}
    assert plan.allocation == "error"
    assert "budget" in numprune("inspect", tmp_path / "pruned").out

    again = numprune("prune", base, tmp_path / "again", "--plan", tmp_path / "pruned" / PLAN_FILE, *text, "--json")
    assert again.json["digest"] == pruned.json["digest"]

    made = numprune(
        *("quantize", tmp_path / "again", tmp_path / "small", "--scheme", "mixed", "--dense", base, *SAMPLED[:2]),
        *(*text, "--sequence-length", 64, "--json"),
    )
    assert made.code == 0, made.err
    written = sum(tensor.nbytes for tensor in load_file(tmp_path / "small" / "model.safetensors").values())
    assert written == made.json["weight_bytes_after"] == checkpoint.weight_bytes(tmp_path / "small")
    assert 0.8 * bytes_allowed < written <= bytes_allowed
    schemes = checkpoint.quantized(checkpoint.audit(tmp_path / "small"))
    for block, bits in made.json["bits"].items():
        layer, kind = block.rsplit(".", 1)
        part = {"attention": "self_attn", "mlp": "mlp"}[kind]
        found = {schemes[name].bits for name in schemes if name.startswith(f"model.{layer}.{part}.")}
        assert found == ({bits} if bits < 16 else set())
        assert plan.blocks[block].scheme == {4: "w4a16", 8: "w8a8", 16: None}[bits]


def test_units_alone_meet_a_budget(numprune: Command, inputs: Path, tmp_path: Path) -> None:
    allowed = limit(inputs, 0.7)
    asked = ("--budget", f"{allowed}B", *SAMPLED, "--text", inputs / "train.txt", "--json")
    pruned = numprune("prune", inputs / "base", tmp_path / "pruned", *asked)
    assert pruned.code == 0, pruned.err
    assert pruned.json["schemes"] == {}
    assert 0.9 * allowed < pruned.json["weight_bytes_after"] <= allowed
    refused = numprune("quantize", tmp_path / "pruned", tmp_path / "out", "--scheme", "mixed", "--method", "rtn")
    assert refused.code == 1
    assert "has no plan with a scheme for each block; prune with a budget and the scheme mixed" in refused.err


def test_several_budgets_are_met_and_the_gap_is_stated(numprune: Command, inputs: Path, tmp_path: Path) -> None:
    base, kv = inputs / "base", budget_of(read_anatomy(checkpoint.read_config(inputs / "base"))).kv_bytes_per_token
    limits = [f"{limit(inputs, 0.7)}B", f"kv={kv // 2}B/token"]
    asked = (*("--budget", limits[0], "--budget", limits[1]), *SAMPLED, "--text", inputs / "train.txt", "--json")
    planned = numprune("prune", base, "--plan-only", *asked)
    assert planned.code == 0, planned.err
    pruned = numprune("prune", base, tmp_path / "pruned", *asked)
    assert pruned.code == 0, pruned.err
    assert pruned.json["weight_bytes_after"] <= limit(inputs, 0.7)
    plan = read_plan(tmp_path / "pruned" / PLAN_FILE)
    assert plan.price is not None
    assert pruned.json["price"] == planned.json["price"] == plan.price.model_dump()
    inspected = numprune("inspect", tmp_path / "pruned")
    for said in (f"{kv // 2} bytes of KV cache per token", "nats per token, at most", "above the lowest possible"):
        assert said in inspected.out
    card = (tmp_path / "pruned" / "README.md").read_text()
    assert "bytes of weights and" in card
    found = forecast(load(inputs / "recipe.toml", [f"prune.budget={limits}"]), tmp_path / "w")
    assert found["after"] == [{"weight_bytes": limit(inputs, 0.7), "kv_bytes_per_token": kv // 2}]
    assert f"bytes and budget {kv // 2:,} bytes of KV cache per token, each block" in text(found)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_plan_that_quantizes_no_block_is_followed(
    numprune: Command, inputs: Path, tmp_path: Path, method: str
) -> None:
    base, text = inputs / "base", ("--text", inputs / "train.txt")
    asked = ("--budget", f"{limit(inputs, 0.7)}B", "--quantization-group", 32, "--align", 32, *SAMPLED)
    assert numprune("prune", base, tmp_path / "plan.json", *asked, *text, "--plan-only").code == 0
    plan = read_plan(tmp_path / "plan.json")
    assert plan.budget is not None
    plan.model_copy(update={"budget": replace(plan.budget, levels=LEVELS["mixed"])}).write(tmp_path / "mixed.json")
    pruned = numprune("prune", base, tmp_path / "pruned", "--plan", tmp_path / "mixed.json", *text)
    assert pruned.code == 0, pruned.err
    fitted = (*text, *SAMPLED) if method == "gptq" else ()
    made = numprune(
        *("quantize", tmp_path / "pruned", tmp_path / "out", "--scheme", "mixed", "--method", method, *fitted)
    )
    assert made.code == 0, made.err
    assert "a copy, since the plan quantizes no block" in made.out
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("pruned", "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "quantization_config" not in (tmp_path / "out" / "config.json").read_text()
    assert set(manifest.read(tmp_path / "out").facts["quantization"]["bits"].values()) == {16}
    assert answers_of(tmp_path / "out", unquantized=tmp_path / "pruned") == answers_of(tmp_path / "out")


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (("--budget", "20ms@decode,b=8,ctx=9"), "a time needs --timings TABLE; make the table with numprune timings"),
        (("--budget", "1MB", "--ratio", 0.3), "ratio is 0.3, and a budget is given"),
        (("--budget", "1MB", "--allocation", "uniform"), "a budget is divided by error"),
        (("--budget", "1MB"), "as it is: nothing has to go"),
        (("--budget", "1KB"), "the budget is 1,000 bytes, but embeddings"),
        (("--ratio", 0.3, "--scheme", "mixed"), "--scheme is counted in a --budget"),
        ((), "required: --ratio, --budget, --hidden-size, --window or --plan"),
    ],
)
def test_budgets_that_make_no_sense_are_refused(
    numprune: Command, inputs: Path, tmp_path: Path, asked: tuple[object, ...], says: str
) -> None:
    answered = numprune("prune", inputs / "base", tmp_path / "out", *asked, "--text", inputs / "train.txt")
    assert answered.code == 1
    assert says in answered.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["prune.budget=0.5"], "prune.budget"),
        (["prune.budget='0.5'"], "budget is '0.5', which is a ratio"),
        (["prune.budget=['6GiB', '7GiB']"], "'6GiB' and '7GiB' limit the same quantity"),
        (["prune.budget='kv=1KiB'"], "one of KV cache must be kv=SIZE/token"),
        (["prune.budget=[]"], "or a list of limits"),
        (["export.dtype=float32"], "prune.budget counts the weights as they are stored"),
    ],
)
def test_recipes_that_contradict_their_budget_are_refused(inputs: Path, overrides: list[str], says: str) -> None:
    with pytest.raises(InputError, match=says):
        load(inputs / "recipe.toml", overrides)


def test_bits_of_each_block_need_a_budget(tiny: Path) -> None:
    with pytest.raises(InputError, match=r"the bits of each block follow from a budget of bytes; set prune\.budget"):
        load(tiny / "recipe.toml", ["quantize.scheme=mixed"])


def test_a_resolved_recipe_within_a_budget_is_the_same_recipe(inputs: Path, tmp_path: Path) -> None:
    recipe = load(inputs / "recipe.toml")
    assert (recipe.prune.ratio, recipe.prune.allocation) == (0, "error")
    (tmp_path / "resolved.toml").write_text(recipe.to_toml())
    assert load(tmp_path / "resolved.toml") == recipe


@pytest.mark.slow
def test_the_release_of_a_recipe_is_within_its_budget_and_says_the_bits(
    numprune: Command, inputs: Path, tmp_path: Path
) -> None:
    forecast = numprune("plan", inputs / "recipe.toml", "--workspace", tmp_path / "w")
    asked = f"budget {limit(inputs, 0.35):,} bytes, each block kept or quantized to w8a8 or w4a16, groups of 32, result"
    assert asked in forecast.out
    release = Path(finish(inputs / "recipe.toml", tmp_path / "w")["release"])
    found = reports.read(release / "report.json")
    assert found.quantization is not None
    assert found.pruning is not None
    assert found.sizes is not None
    assert found.sizes.weight_bytes is not None
    assert found.quantization.scheme == "mixed"
    plan = json.loads((release / "checkpoint" / PLAN_FILE).read_text())
    bits = {"w4a16": 4, "w8a8": 8, None: 16}
    assert found.quantization.bits == {name: bits[block.get("scheme")] for name, block in plan["blocks"].items()}
    assert found.pruning.budget_asked == limit(inputs, 0.35)
    assert found.sizes.weight_bytes.candidate <= found.pruning.budget_asked  # type: ignore[operator]
    assert found.parity["vllm"]["format"]["matrices"] > 0  # type: ignore[call-overload, index, operator]
    for name in ("report.md", "report.html"):
        text = (release / name).read_text()
        assert "quantized to the bits chosen for each block, 32 channels per scale, by gptq" in text
        assert "layer 0" in text
        assert "weights of at most" in text
