"""Windows in some layers, from the command line and in a recipe."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from numprune.anatomy import read_anatomy
from numprune.budget import kv_bytes
from numprune.errors import InputError
from numprune.export import checkpoint, vllm
from numprune.flows import forecast, recipe
from numprune.flows.steps.export import export_and_prove
from numprune.flows.steps.prune import options_of, prune_checkpoint
from numprune.flows.steps.report import pruning_section
from numprune.plans import PLAN_FILE, read_plan
from numprune.serving.report import Pruning, Report, markdown, page, words
from numprune.spans import full_layers
from tests.flows.conftest import Answered
from tests.serving.conftest import COMPLETE
from tests.serving.pages import Parsed
from tests.serving.test_headline import plain

Command = Callable[..., Answered]
WINDOW = ("--window", 8, "--window-layers", 1, "--samples", 8, "--sequence-length", 64)


@pytest.mark.slow
def test_the_layer_with_the_lowest_price_gets_the_window(numprune: Command, tiny: Path, tmp_path: Path) -> None:
    base, text = tiny / "base", ("--text", tiny / "train.txt", "--json")
    made = numprune("prune", base, tmp_path / "made", *WINDOW, *text)
    assert made.code == 0, made.err
    plan = read_plan(tmp_path / "made" / PLAN_FILE)
    (layer,) = made.json["windowed_layers"]
    assert plan.window_prices[layer] == min(plan.window_prices.values()) == plan.windowed[0].divergence
    assert (made.json["window"], made.json["parameters_after"]) == (8, made.json["parameters_before"])

    planned = numprune("prune", base, "--plan-only", *WINDOW, *text)
    assert planned.json["windowed"] == [one.model_dump() for one in plan.windowed]
    again = numprune("prune", base, tmp_path / "again", "--plan", tmp_path / "made" / PLAN_FILE, *text)
    assert again.json["digest"] == made.json["digest"], again.err
    streamed = numprune("prune", base, tmp_path / "streamed", "--stream", *WINDOW, *text)
    assert streamed.code == 0, streamed.err
    for name in (PLAN_FILE, "config.json"):
        assert (tmp_path / "streamed" / name).read_bytes() == (tmp_path / "made" / name).read_bytes()
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("made", "streamed")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    told = numprune("prune", base, "--plan-only", *WINDOW, "--text", tiny / "train.txt").out
    for line in (
        f"window of 8 tokens: layer {1 - layer}",
        f"chosen: a window in layer {layer}",
        "KV cache at 256 tokens",
    ):
        assert line in told

    inspected = numprune("inspect", tmp_path / "made", "--json").json
    assert (inspected["windowed_layers"], inspected["sliding_window"]) == ([layer], 8)
    assert f"8 tokens in layer {layer} of the base model" in (tmp_path / "made" / "README.md").read_text()
    assert vllm.serving_facts(tmp_path / "made")["plugin"] is False
    for target in ("onnx", "onnxruntime"):
        _, proof = export_and_prove(tmp_path / "made", tmp_path / target, target, "float32")
        assert proof["logit_error_max"] < 1e-4


def test_a_budget_of_the_cache_at_a_context(numprune: Command, tiny: Path, tmp_path: Path) -> None:
    base = tiny / "base"
    anatomy = read_anatomy(checkpoint.read_config(base))
    asked = ("--window", 8, "--budget", f"kv={kv_bytes(anatomy, 64) - 1}B@ctx=64", *WINDOW[4:])
    made = numprune("prune", base, tmp_path / "made", *asked, "--text", tiny / "train.txt", "--json")
    assert made.code == 0, made.err
    after = read_anatomy(checkpoint.read_config(tmp_path / "made"))
    assert len(full_layers(after)) == anatomy.layers - 1
    assert kv_bytes(after, 64) == kv_bytes(anatomy, 64) * (64 + 8) // 128
    card = (tmp_path / "made" / "README.md").read_text()
    assert "(0.0% asked for)" in card
    assert f"of the base model, for at most {kv_bytes(anatomy, 64) - 1:,} bytes of KV cache at 64 tokens" in card


def test_the_forecast_and_the_report(tiny: Path, tmp_path: Path) -> None:
    asked = recipe.load(tiny / "recipe.toml", ["prune.window=8", "prune.window_layers=1", "prune.ratio=0.0"])
    found = forecast.forecast(asked, tmp_path / "w")
    cache = kv_bytes(read_anatomy(checkpoint.read_config(tiny / "base")), 256)
    assert f"1 layer will see 8 tokens, KV cache at 256 tokens {cache:,} → {cache * (256 + 8) // 512:,} bytes" in (
        forecast.text(found)
    )

    narrow = ["prune.window=8", "prune.window_layers=1", "prune.ratio=0.199", "prune.axes=['kv-groups']"]
    line = f"KV cache at 256 tokens {cache:,} → "
    for allocation, left in (("uniform", f"{cache * (256 + 8) // 1024:,} bytes"), ("error", "at most ")):
        both = recipe.load(tiny / "recipe.toml", [*narrow, f"prune.allocation={allocation}"])
        assert f"{line}{left}" in forecast.text(forecast.forecast(both, tmp_path / "w"))

    options = options_of(asked.prune, asked.sizes(), tiny / "base", "none")
    rows = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(0))
    facts = prune_checkpoint(tiny / "base", rows, options, tmp_path / "pruned", torch.device("cpu"))
    section = Pruning.model_validate(pruning_section(asked.prune, None, facts))
    assert (section.ratio_removed.kv_bytes, section.ratio_removed.kv_context) == (1 - (256 + 8) / 512, 256)
    report = Report.model_validate({**COMPLETE, "pruning": section.model_dump()})
    assert "48.4 % of the KV cache at 256 tokens." in plain(markdown(report))
    assert "KV cache removed 48.4 % at 256 tokens" in plain(Parsed(page.html(report)).text)
    assert words.window(section) == f"8 tokens in layer {facts.windowed_layers[0]}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["prune.window=64", "prune.window_layers=1"], "rows of 64 tokens do not reach beyond it"),
        (["prune.window_layers=1"], "window_layers is 1, and no window is given"),
        (["prune.window=8"], "give window_layers, or a budget of KV cache like"),
        (["prune.window=8", "prune.window_layers=1", "learn.method=vib"], "window: masks learn units"),
        (["prune.budget='kv=1KiB@ctx=64'"], "and no window is given"),
    ],
)
def test_impossible_recipes_are_refused_before_any_work(
    tiny: Path, tmp_path: Path, changes: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        forecast.forecast(recipe.load(tiny / "recipe.toml", changes), tmp_path / "w")
