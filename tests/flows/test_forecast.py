"""The forecast of a run matches the run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from numprune.anatomy import read_anatomy
from numprune.budget import budget_of
from numprune.export import checkpoint
from numprune.flows import forecast, recipe, stages
from numprune.flows.candidate import sample_calibration
from numprune.flows.steps.checks.quantization import schemes_asked
from numprune.flows.steps.prepare import prepare
from numprune.flows.steps.prune import options_of, prune_checkpoint
from numprune.flows.steps.quantize import quantize_checkpoint
from numprune.option_checks import known_results
from numprune.options import PruneOptions
from numprune.pruning import prune
from numprune.target import Target
from tests.conftest import build_tiny, recast
from tests.flows.conftest import Answered

ROWS = torch.randint(0, 256, (12, 24), generator=torch.Generator().manual_seed(0))
Command = Callable[..., Answered]


def plan(numprune: Command, tiny: Path, workspace: Path, *overrides: str) -> Answered:
    changes = [word for override in overrides for word in ("--set", override)]
    return numprune("plan", tiny / "recipe.toml", "--workspace", workspace, "--json", *changes)


def test_plan_writes_nothing_and_matches_dry_run(numprune: Command, tiny: Path, tmp_path: Path) -> None:
    answered = plan(numprune, tiny, tmp_path / "w")
    assert answered.code == 0, answered.err
    assert not (tmp_path / "w").exists()
    found = answered.json
    names = [stage["name"] for stage in found["stages"]]
    assert {"calibration", "heldout", "baseline", "prune", "quality", "benchmark onnxruntime", "report"} <= set(names)
    assert not any(stage["reused"] for stage in found["stages"])
    assert found["before"]["weight_bytes"] == checkpoint.weight_bytes(tiny / "base")
    assert (found["text"]["samples"], found["text"]["heldout_documents"]) == (12, 24)
    assert found["text"]["calibration_windows"] >= 12
    dry = numprune("optimize", "--dry-run", tiny / "recipe.toml", "--workspace", tmp_path / "w", "--json")
    assert dry.json == found
    told = numprune("plan", tiny / "recipe.toml", "--workspace", tmp_path / "w").out
    assert "calibration: 12 of" in told
    assert "to be computed" in told


def test_streaming_needs_memory_for_a_layer_and_the_next_one(tiny: Path, tmp_path: Path) -> None:
    found = forecast.forecast(recipe.load(tiny / "recipe.toml", ["prune.stream=true"]), tmp_path / "w")
    anatomy = read_anatomy(checkpoint.read_config(tiny / "base"))
    layer = (budget_of(anatomy).parameters - anatomy.fixed_parameters) // anatomy.layers
    assert found["memory"]["weights_float32"] == 4 * (anatomy.fixed_parameters + 2 * layer)


def test_finished_stages_would_be_reused_unless_the_recipe_changes(tiny: Path, tmp_path: Path) -> None:
    run = prepare(recipe.load(tiny / "recipe.toml", []), tmp_path / "w")
    run.make(sample_calibration(run))
    for changes, reused in (
        ([], ["calibration"]),
        (["prune.ratio=0.1"], ["calibration"]),
        (["data.samples=11"], []),
    ):
        found = forecast.forecast(recipe.load(tiny / "recipe.toml", changes), tmp_path / "w")
        assert [stage["name"] for stage in found["stages"] if stage["reused"]] == reused


@pytest.mark.parametrize("name", ["manifest.json", stages.RESULT])
def test_a_damaged_stage_would_be_made_again(tiny: Path, tmp_path: Path, name: str) -> None:
    run = prepare(recipe.load(tiny / "recipe.toml", []), tmp_path / "w")
    stage = sample_calibration(run)
    made = run.make(stage)
    assert stages.find(run.workspace, stage) is not None
    for damage in ((made.path / name).unlink, lambda: (made.path / name).write_text("{")):
        damage()
        assert stages.find(run.workspace, stage) is None
        assert not run.make(stage).reused
        assert stages.find(run.workspace, stage) is not None


@pytest.mark.parametrize("drop_layers", [0, 1])
def test_the_forecast_matches_the_run(drop_layers: int) -> None:
    def options(**changes: Any) -> PruneOptions:
        return PruneOptions(0.6, target=Target(align=1), drop_layers=drop_layers, **changes)

    anatomy = read_anatomy(build_tiny().config)
    exact = options(criterion="magnitude", compensation="none")
    (known,) = known_results(anatomy, exact)
    assert budget_of(known) == budget_of(read_anatomy(prune(build_tiny(), ROWS, exact).model.config))
    several = known_results(anatomy, options())
    assert budget_of(read_anatomy(prune(build_tiny(), ROWS, options()).model.config)) in map(budget_of, several)
    assert known_results(anatomy, options(allocation="error")) == []


@pytest.mark.parametrize(
    ("family", "dtype", "scheme"),
    [("llama", "bfloat16", "w4a16"), ("llama", "bfloat16", "w8a8"), ("opt", "float16", "fp8")],
)
def test_the_forecast_counts_the_bytes_of_quantized_weights(
    tiny: Path, tiny_checkpoint: Callable[..., Path], tmp_path: Path, family: str, dtype: str, scheme: str
) -> None:
    """Values, scales and biases: the forecast equals the file if the sizes are known."""
    base = recast(tiny_checkpoint(family), getattr(torch, dtype))
    overrides = [
        *(f"model.path={base}", "export.targets=[]", "benchmark.runtimes=['torch']", "target.align=32"),
        *("prune.ratio=0.25", "prune.compensation=none", "prune.criterion=magnitude", "quantize.group_size=32"),
    ]
    asked = recipe.load(tiny / "recipe.toml", [*overrides, f"quantize.scheme={scheme}"])
    found = forecast.forecast(asked, tmp_path / "w")
    assert found["exact"]
    where, options = torch.device("cpu"), options_of(asked.prune, asked.sizes(), base, scheme)
    prune_checkpoint(base, ROWS, options, tmp_path / "pruned", where)
    [chosen] = schemes_asked(asked.quantize)
    quantize_checkpoint(tmp_path / "pruned", chosen, tmp_path / "quantized", where)
    assert found["after"][0]["weight_bytes"] == checkpoint.weight_bytes(tmp_path / "quantized")
    assert found["quantization"] == str(chosen)
    assert f"then quantized to {found['quantization']}" in forecast.text(found)


def test_the_forecast_for_layers_of_different_sizes_is_the_target(
    numprune: Command, tiny: Path, tmp_path: Path
) -> None:
    found = plan(numprune, tiny, tmp_path / "w", "prune.allocation=error").json
    (after,) = found["after"]
    assert not found["exact"]
    left = found["before"]["prunable_parameters"] * (1 - found["ratio"])
    assert after["prunable_parameters"] == pytest.approx(left, abs=1)
    assert found["serving"] == {} or found["serving"]["plugin"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("data.samples=100000", "data.samples: the calibration text gives"),
        ("prune.ratio=0.999", "prune: "),
        ("export.dtype=bfloat16", "export.dtype: dtype=bfloat16: ONNX Runtime has no bfloat16 kernels for a CPU"),
        ("prune.drop_layers=2", "prune: drop_layers is 2; the model has 2 layers, and at least one must stay"),
    ],
)
def test_impossible_recipes_are_reported(numprune: Command, tiny: Path, tmp_path: Path, change: str, said: str) -> None:
    answered = plan(numprune, tiny, tmp_path / "w", change)
    assert answered.code == 1
    assert said in answered.err


def test_the_hidden_size_that_masks_choose_is_not_forecast(numprune: Command, tiny: Path, tmp_path: Path) -> None:
    changes = ("learn.method=vib", "prune.axes=['channels','hidden-size']")
    answered = plan(numprune, tiny, tmp_path / "w", *changes)
    assert answered.code == 0, answered.err
    assert (answered.json["hidden_size_is_chosen"], answered.json["exact"]) == (True, False)
    assert "the masks choose it" in forecast.text(answered.json)


def test_masks_are_forecast_whatever_the_criterion_of_pruning_is(numprune: Command, tiny: Path, tmp_path: Path) -> None:
    learned = plan(numprune, tiny, tmp_path / "w", "learn.method=vib", "prune.criterion=frequency")
    assert learned.code == 0, learned.err
    assert learned.json["after"]
    refused = plan(numprune, tiny, tmp_path / "w", "prune.criterion=frequency")
    assert (refused.code, "criterion frequency ranks experts" in refused.err) == (1, True)


@pytest.mark.parametrize(
    ("constraint", "axes", "said", "after"),
    [
        ("parameters", ["kv-groups", "channels"], "ratio 0.5, result: the target", {"parameters", "weight_bytes"}),
        # KV groups are less than half of the parameters.
        ("kv-bytes", ["kv-groups"], "ratio 0.5 of the KV-cache bytes, result: the target", {"kv_bytes_per_token"}),
        ("flops", ["kv-groups", "channels"], "ratio 0.5 of the FLOPs of the blocks, result: the target", set()),
    ],
)
def test_a_ratio_of_another_cost_is_named(
    numprune: Command, tiny: Path, tmp_path: Path, constraint: str, axes: list[str], said: str, after: set[str]
) -> None:
    learned = ("learn.method=vib", f"learn.constraint={constraint}", "prune.allocation=error")
    changes = (*learned, "prune.ratio=0.5", f"prune.axes={axes}")
    answered = plan(numprune, tiny, tmp_path / "w", *changes)
    assert answered.code == 0, answered.err
    assert said in forecast.text(answered.json)
    (found,) = answered.json["after"] or [{}]
    assert after <= found.keys()
    if constraint == "kv-bytes":
        assert found["kv_bytes_per_token"] * 2 == answered.json["before"]["kv_bytes_per_token"]
        in_half = ("export.targets=['vllm']", "export.dtype=bfloat16", "benchmark.runtimes=['torch']")
        (found,) = plan(numprune, tiny, tmp_path / "w", *changes, *in_half).json["after"]
        assert found["kv_bytes_per_token"] * 4 == answered.json["before"]["kv_bytes_per_token"]


def test_earlier_runs_give_the_stage_times(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "w" / "runs"
    for number, seconds in ((1, 5.0), (2, 7.5)):
        run = f"2026010{number}T000000Z-0000000{number}"
        stage = {
            "name": "prune",
            "folder": "prune-0123456789abcdef",
            "digest": "0" * 64,
            "reused": False,
            "seconds": seconds,
            "peak_memory_bytes": 1 << 30,
            "bytes": 1,
        }
        record = {
            "schema": "numprune/run/1",
            "run": run,
            "name": "tiny",
            "recipe": "r",
            "source": "s",
            "numprune": "0",
            "pid": 1,
            "started": "2026-01-01T00:00:00Z",
            "stages": [stage],
        }
        (folder / run).mkdir(parents=True)
        (folder / run / "record.json").write_text(json.dumps(record))
    found = forecast.forecast(recipe.load(tiny / "recipe.toml", []), tmp_path / "w")
    stages = {stage["name"]: stage for stage in found["stages"]}
    assert stages["prune"]["last_seconds"] == 7.5
    assert "last_seconds" not in stages["quality"]
    assert "last took 7.5 s, peak 1,024 MiB" in forecast.text(found)


def test_only_trained_weights_have_gradients_and_moments(tiny: Path, tmp_path: Path) -> None:
    needed = {}
    for train in ("all", "lora", "blocks"):
        asked = recipe.load(tiny / "recipe.toml", ["recover.method=distill", f"recover.train={train}"])
        found = forecast.forecast(asked, tmp_path / "w")
        needed[train] = found["memory"]["training"]
    dense = 4 * found["before"]["parameters"]
    assert needed["lora"] == needed["blocks"]
    assert needed["all"] - dense == 4 * (needed["lora"] - dense) > 0


def test_missing_stages_are_the_same_if_their_inputs_would_be(tiny: Path, tmp_path: Path) -> None:
    def planned(*changes: str) -> dict[str, str]:
        run = prepare(recipe.load(tiny / "recipe.toml", changes), tmp_path / "w")
        return {stage.name: stage.inputs for stage in forecast.planned(run)}

    one, alike, other = planned(), planned("quantize.group_size=32"), planned("prune.ratio=0.5")
    for name in ("prune", "export vllm candidate", "quality", "benchmark onnxruntime"):
        assert one[name] == alike[name] != other[name]
    assert one["export onnx baseline"] == other["export onnx baseline"]
    assert len({one["report"], alike["report"], other["report"]}) == 3
