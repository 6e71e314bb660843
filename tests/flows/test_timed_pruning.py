# ruff: noqa: F811 - fixtures of another file
"""Pruning to a budget of time by a table of latencies: commands and recipes."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from numprune.errors import InputError
from numprune.export import checkpoint, manifest
from numprune.export.files import CARD
from numprune.flows.candidate import learn
from numprune.flows.cli.planned import latency_lines
from numprune.flows.names import CHECKPOINT, LEARNED
from numprune.flows.recipe import load
from numprune.flows.run import prepare
from numprune.flows.stages import RESULT, Artifact, StageResult, Text, place_of, read_facts
from numprune.flows.steps.bodies.candidate import make_pruned_within_time, make_timings
from numprune.flows.steps.bodies.rows import make_calibration
from numprune.flows.steps.report import pruning_section
from numprune.flows.steps.results import TimedCheckpoint
from numprune.hidden import Width
from numprune.plans import PLAN_FILE, read_plan
from numprune.serving.report import LatencyBudget
from numprune.timings import TimingTable
from tests.conftest import build_tiny, write_checkpoint
from tests.flows.conftest import Answered
from tests.flows.timing import (  # noqa: F401 - fixtures
    AROUND_MS,
    DECODE,
    FORWARD,
    SAMPLED,
    benchmark_on,
    command_of,
    inputs,
    latency,
    machine,
    write_table,
)

Command = Callable[..., Answered]


@pytest.mark.slow
def test_the_pruned_model_is_within_the_budget_and_measured(numprune: Command, inputs: Path, tmp_path: Path) -> None:
    base, table = inputs / "base", tmp_path / "table.json"
    whole = write_table(base, table, 1e3)  # seconds, so that any machine is faster
    command = ("--budget", f"{0.8 * whole}ms@{DECODE}", "--timings", table, *SAMPLED, "--text", inputs / "train.txt")
    answered = numprune("prune", base, tmp_path / "pruned", *command, "--json")
    assert answered.code == 0, answered.err
    found = answered.json["latency"]
    assert found["dense_predicted"]["ms"] == pytest.approx(whole)
    assert 0.6 * whole < found["predicted"]["ms"] <= found["limit_ms"] == pytest.approx(0.8 * whole)
    assert 0 < found["measured"]["interval95"][0] <= found["measured"]["ms"] < found["predicted"]["ms"]
    assert found["corrections"] == 0
    plan = read_plan(tmp_path / "pruned" / PLAN_FILE)
    assert plan.time_budget is not None
    assert f"ms@{DECODE} in torch" in numprune("inspect", tmp_path / "pruned").out
    chosen = numprune("prune", base, *command, "--plan-only", "--json")
    assert chosen.json["predicted_ms"] == pytest.approx(found["predicted"]["ms"])
    again = numprune(
        "prune", base, tmp_path / "again", "--plan", tmp_path / "pruned" / PLAN_FILE, *command[4:], "--json"
    )
    assert again.json["digest"] == answered.json["digest"]


@pytest.mark.parametrize(("slower", "corrections"), [(1.1, 1), (1.0, 0)])
def test_a_measurement_corrects_the_table(
    numprune: Command,
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    slower: float,
    corrections: int,
) -> None:
    benchmark_on(monkeypatch, lambda _: slower)
    whole = write_table(inputs / "base", tmp_path / "table.json", 1.0)
    answered = numprune(*command_of(inputs, tmp_path, 0.8 * whole), "--json")
    assert answered.code == 0, answered.err
    found = answered.json["latency"]
    assert found["corrections"] == corrections
    assert 0.7 * whole < found["measured"]["ms"] <= found["limit_ms"]
    assert found["predicted"]["ms"] == pytest.approx(found["measured"]["ms"])
    card = (tmp_path / "pruned" / CARD).read_text()
    assert f"(to meet a budget of {0.8 * whole:.4g} ms@{DECODE} in torch)" in card


@pytest.mark.parametrize(("smaller", "corrections"), [(1.0, 0), (0.9, 1)])
def test_a_speedup_is_over_the_dense_model_as_measured(
    numprune: Command,
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    smaller: float,
    corrections: int,
) -> None:
    """A machine that is twice as slow changes nothing; if smaller blocks are slower than the table says, that does."""
    benchmark_on(monkeypatch, lambda _: 2.0)
    whole = write_table(inputs / "base", tmp_path / "table.json", 1.0)
    table = json.loads((tmp_path / "table.json").read_text())
    for times in table["scenarios"][0]["blocks"].values():
        for time in times[:-1]:  # the last one is the model's own
            time["ms"] *= smaller
    (tmp_path / "table.json").write_text(json.dumps(table))
    *command, _, limit, option, path = command_of(inputs, tmp_path, 0.0)[:7]
    assert "@" in str(limit)
    fitting = command_of(inputs, tmp_path, 0.0)[7:]
    answered = numprune(*command, "--budget", f"1.25x@{DECODE}", option, path, *fitting, "--json")
    assert answered.code == 0, answered.err
    found = answered.json["latency"]
    assert (found["corrections"], found["speedup"]) == (corrections, 1.25)
    assert found["dense_measured"]["ms"] == pytest.approx(2 * whole)
    assert found["limit_ms"] == pytest.approx(2 * whole / 1.25)
    assert 0.7 * found["limit_ms"] < found["measured"]["ms"] <= found["limit_ms"]
    budget = read_plan(tmp_path / "pruned" / PLAN_FILE).time_budget
    assert budget is not None
    assert (budget.speedup, str(budget)) == (1.25, f"1.25x@{DECODE}")
    assert f"(to meet a budget of 1.25x@{DECODE} in torch)" in (tmp_path / "pruned" / CARD).read_text()
    assert f"at most {2 * whole / 1.25:.4g} ms for 1.25x:" in "\n".join(latency_lines(LatencyBudget(**found)))


@pytest.mark.slow
def test_a_correction_keeps_the_chosen_shape(
    numprune: Command, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark_on(monkeypatch, lambda _: 1.1)
    whole = write_table(inputs / "base", tmp_path / "table.json", 1.0)
    write_table(inputs / "base", tmp_path / "narrower.json", 1.0, width=Width(48, "coordinates"))
    candidates = (tmp_path / "narrower.json", "--hidden-size", 48, "--basis", "coordinates", "--drop-layers", 0, 1)
    *command, budget, limit, option, table = command_of(inputs, tmp_path, 0.7 * whole)[:7]
    rest = command_of(inputs, tmp_path, 0.7 * whole)[7:]
    answered = numprune(*command, budget, limit, option, table, *candidates, *rest, "--json")
    assert answered.code == 0, answered.err
    found, plan = answered.json["latency"], read_plan(tmp_path / "pruned" / PLAN_FILE)
    assert (found["corrections"], found["dense_predicted"]["ms"] > whole) == (1, True)
    assert found["measured"]["ms"] <= found["limit_ms"]
    assert plan.shape is not None
    assert answered.json["shape"] == plan.shape.model_dump()
    left = checkpoint.read_config(tmp_path / "pruned")
    chosen = plan.shape.tried[0]
    assert (left.hidden_size, 2 - left.num_hidden_layers) == (chosen.hidden_size, chosen.drop_layers)


def test_a_model_that_stays_too_slow_is_refused(
    numprune: Command, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark_on(monkeypatch, lambda looks: 1.2**looks)  # each time slower than the table says by then
    whole = write_table(inputs / "base", tmp_path / "table.json", 1.0)
    answered = numprune(*command_of(inputs, tmp_path, 0.8 * whole))
    assert answered.code == 1
    assert "after 3 corrections of the table the pruned model still takes" in answered.err
    assert not (tmp_path / "pruned").exists()
    benchmark_on(monkeypatch, lambda _: 100.0)
    answered = numprune(*command_of(inputs, tmp_path, 0.8 * whole))
    assert answered.code == 1
    assert "ms were predicted: the budget is" in answered.err
    assert {path.name for path in tmp_path.iterdir()} == {"table.json"}


def test_a_recipe_measures_blocks_and_prunes_within_the_budget(
    inputs: Path, tmp_path: Path, machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bodies of its stages, on a machine whose latencies are those of `latency`."""
    benchmark_on(monkeypatch, lambda _: 1.0)
    whole = latency(checkpoint.read_config(inputs / "base"))
    asked = [
        f"prune.budget={0.8 * whole}ms@{DECODE}",
        "timings.sizes=4",
        "timings.visits=3",
        "prune.compensation=oneshot",
    ]
    recipe = load(inputs / "recipe.toml", asked)
    base = Artifact(inputs / "base", "")
    places = {name: tmp_path / "w" / name / "content" for name in ("rows", "times", "pruned")}
    for place in places.values():
        place.mkdir(parents=True)
    reading = recipe.data.reading()
    text = Text([str(inputs / "train.txt")], "")
    make_calibration(places["rows"], model=base, text=text, samples=8, sequence_length=64, seed=0, reading=reading)
    named: dict[str, Any] = {
        "asked": recipe.timings,
        "target": recipe.sizes(),
        "served": recipe.served(),
        "machine": {},
    }
    table = make_timings(places["times"], model=Text(str(base.path), ""), scenario=DECODE, width=None, **named)
    (places["times"] / RESULT).write_text(table.model_dump_json())
    rows, times = (Artifact(places[name], "") for name in ("rows", "times"))
    named |= {"asked": recipe.prune, "device": "cpu"}
    named |= {"base": base, "origin": base, "rows": rows, "times": [times]}
    made = make_pruned_within_time(places["pruned"], learned=None, **named)
    assert read_facts(places["times"], TimingTable) == table
    assert made.digest == manifest.read(places["pruned"] / "checkpoint").digest
    assert made.latency.measured.ms == pytest.approx(made.latency.predicted.ms)
    assert 0.5 * whole < made.latency.predicted.ms <= 0.8 * whole  # type: ignore[operator]
    section = pruning_section(recipe.prune, None, made)
    assert (section["ratio_asked"], section["budget_asked"], section["latency"]) == (None, None, made.latency)


def test_masks_are_learned_within_the_budget_and_what_they_chose_is_measured(
    numprune: Command, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, table, learned = inputs / "base", tmp_path / "table.json", tmp_path / "learned"
    whole = write_table(base, table, 1.0)
    limit = 0.8 * whole
    budget, text = f"{limit}ms@{DECODE}", ("--text", inputs / "train.txt")
    how = ("--budget", budget, "--timings", table, "--tokens", 1_000, "--sequence-length", 32, "--compensation", "none")
    made = numprune("learn", base, learned / LEARNED, *how, *text, "--json")
    assert made.code == 0, made.err
    assert (made.json["constraint"], read_plan(Path(made.json["plan"])).ratio) == ("milliseconds", 0)
    allowed = 1 - (limit - AROUND_MS) / (whole - AROUND_MS)
    assert allowed - 1e-6 <= made.json["removed"] < allowed + 0.1
    assert "of the time of the blocks to remove" in numprune("learn", base, tmp_path / "again", *how, *text).out

    # A recipe's run prunes by this plan, and measures.
    recipe = load(inputs / "recipe.toml", [f"prune.budget={budget}", "learn.method=vib", "prune.compensation=none"])
    rows = tmp_path / "rows"
    rows.mkdir()
    make_calibration(
        rows,
        model=Artifact(base, ""),
        text=Text([str(inputs / "train.txt")], ""),
        samples=8,
        sequence_length=64,
        seed=0,
        reading=recipe.data.reading(),
    )

    def pruned(name: str) -> TimedCheckpoint:
        return make_pruned_within_time(
            tmp_path / name,
            base=Artifact(base, ""),
            origin=Artifact(base, ""),
            rows=Artifact(rows, ""),
            times=[Artifact(tmp_path, "")],
            learned=Artifact(learned / LEARNED, ""),
            asked=recipe.prune,
            target=recipe.sizes(),
            served=recipe.served(),
            device="cpu",
            machine={},
        )

    benchmark_on(monkeypatch, lambda _: 1.0)
    found = pruned("pruned")
    assert found.latency.predicted.ms == pytest.approx(found.latency.measured.ms)
    assert 0.6 * whole < found.latency.measured.ms <= limit
    followed = read_plan(tmp_path / "pruned" / CHECKPOINT / PLAN_FILE)
    assert followed.sizes() == read_plan(Path(made.json["plan"])).sizes()
    benchmark_on(monkeypatch, lambda _: 1.5)
    with pytest.raises(InputError, match=r"ms were predicted: measure the table again, or learn masks for a budget of"):
        pruned("slow")
    assert not (tmp_path / "slow" / CHECKPOINT).exists()


def test_the_table_is_part_of_what_decides_the_masks(inputs: Path, tmp_path: Path) -> None:
    run = prepare(load(inputs / "recipe.toml", [f"prune.budget=5ms@{DECODE}", "learn.method=vib"]), tmp_path)

    def learning(digest: str) -> Path:
        rows, times = (StageResult("", tmp_path, made, None, False, 0.0, 0, 0) for made in ("", digest))
        return place_of(tmp_path, learn(run, rows, times)).path  # type: ignore[arg-type]

    assert learning("a") == learning("a") != learning("b")


def test_a_forecast_has_the_measurement(numprune: Command, inputs: Path, tmp_path: Path) -> None:
    asked = ("--set", f"prune.budget=5ms@{DECODE}", "--workspace", tmp_path / "w")
    answered = numprune("plan", inputs / "recipe.toml", *asked)
    assert answered.code == 0, answered.err
    assert f"budget 5ms@{DECODE}, among sizes that are measured" in answered.out
    lines = [line.split()[0] for line in answered.out.splitlines()]
    assert lines.index("timings") < lines.index("prune")
    shapes = ("--set", "prune.hidden_size=[48]", "--set", "prune.drop_layers=[0, 1]")
    several = numprune("plan", inputs / "recipe.toml", *asked, *shapes)
    assert several.code == 0, several.err
    assert "one of 4 candidates" in several.out
    assert several.out.count("timings at hidden size 48") == 1
    alone = numprune("plan", inputs / "recipe.toml", *asked, "--set", "prune.drop_layers=1")
    assert alone.code == 0, alone.err
    learned = numprune("plan", inputs / "recipe.toml", *asked, "--set", "learn.method=vib")
    assert learned.code == 0, learned.err
    lines = [line.split()[0] for line in learned.out.splitlines()]
    assert lines.index("timings") < lines.index("learn") < lines.index("prune")


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["prune.budget=5ms@decode"], "scenario is 'decode'"),
        ([f"prune.budget=5ms@{DECODE}", "prune.ratio=0.2"], "prune.ratio = 0.2: with a time"),
        (["timings.sizes=4"], "timings: it has an effect only with a time as prune.budget"),
        (
            [f"prune.budget=['6MiB', '5ms@{DECODE}']", "quantize.scheme=mixed"],
            "quantize.scheme = 'mixed': latencies are of blocks in one scheme; choose one for all",
        ),
        ([f"prune.budget=5ms@{DECODE}", "prune.window=8", "prune.window_layers=1"], "prune.window = 8: with a time"),
        (
            [f"prune.budget=5ms@{DECODE}", "learn.method=vib", "learn.constraint=flops"],
            "learn.constraint = 'flops': prune.budget limits milliseconds; leave one of them out",
        ),
        (
            [f"prune.budget=5ms@{DECODE}", "learn.method=vib", "prune.axes=['channels','hidden-size']"],
            "prune.axes: a time is met by units alone; leave out hidden-size, or use a ratio",
        ),
    ],
)
def test_recipes_that_contradict_their_budget_are_refused(inputs: Path, overrides: list[str], says: str) -> None:
    with pytest.raises(InputError, match=says):
        load(inputs / "recipe.toml", overrides)


def test_a_recipe_exports_what_it_times(numprune: Command, inputs: Path, tmp_path: Path) -> None:
    """Of ONNX Runtime's two exports, benchmarks and latencies of blocks are those of the faster one."""
    asked = ("--set", f"prune.budget=5ms@{DECODE}", "--set", "timings.runtime=onnxruntime", "--workspace", tmp_path)
    answered = numprune("plan", inputs / "recipe.toml", *asked, "--set", "export.targets=['vllm', 'onnx']")
    assert answered.code == 1
    assert "timed as the export 'onnxruntime', and export.targets are vllm, onnx; add 'onnxruntime'" in answered.err
    answered = numprune("plan", inputs / "recipe.toml", *asked, "--set", "export.targets=['onnx', 'onnxruntime']")
    assert answered.code == 0, answered.err


def test_a_scenario_beyond_the_context_is_refused_before_any_work(
    numprune: Command, inputs: Path, tmp_path: Path
) -> None:
    asked = ("--set", "prune.budget=5ms@decode,b=1,ctx=9999", "--workspace", tmp_path / "w")
    answered = numprune("plan", inputs / "recipe.toml", *asked)
    assert answered.code == 1
    assert "prune: scenario decode,b=1,ctx=9999 needs 10009 positions" in answered.err


def test_budgets_of_time_that_make_no_sense_are_refused(numprune: Command, inputs: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    whole = write_table(inputs / "base", table, 1.0, device="another CPU")
    text = ("--text", inputs / "train.txt")
    for options, says in (
        (("--budget", f"1ms@{DECODE}"), "a time needs --timings TABLE"),
        (("--budget", "1MB", "--timings", table), "--timings is for a --budget of time"),
        (("--ratio", 0.3, "--timings", table), "--timings is for a --budget of time"),
        (("--budget", f"1ms@{DECODE}", "--timings", table), "device is another CPU in the table and"),
    ):
        answered = numprune("prune", inputs / "base", tmp_path / "out", *options, *text)
        assert answered.code == 1
        assert says in answered.err
    write_table(inputs / "base", table, 1.0)
    for options, says in (
        (("--budget", f"{2 * whole}ms@{DECODE}"), "nothing has to go"),
        (("--budget", "1ms@decode,b=1,ctx=17"), "decode,b=1,ctx=17 was not measured"),
        (("--budget", f"1ms@{DECODE}", "--scheme", "w8a8"), "quantization is none in the table and w8a8 here"),
        (("--budget", f"1ms@{DECODE}", "--tensor-parallel", 2), "tensor_parallel is 1 in the table and 2 here"),
    ):
        answered = numprune("prune", inputs / "base", tmp_path / "out", "--timings", table, *options, *text)
        assert answered.code == 1
        assert says in answered.err
    assert json.loads(table.read_text())["version"] == "numprune/timings/1"


def test_an_encoder_is_pruned_to_a_budget_of_a_forward_pass(
    numprune: Command, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark_on(monkeypatch, lambda _: 1.0)
    base, table = write_checkpoint(build_tiny("bert"), tmp_path / "base"), tmp_path / "table.json"
    whole = write_table(base, table, 1.0, scenario=FORWARD)
    budget = ("--budget", f"{0.8 * whole:.6f}ms@{FORWARD}", "--timings", table, "--compensation", "oneshot")
    answered = numprune("prune", base, tmp_path / "pruned", *budget, *SAMPLED, "--text", inputs / "train.txt", "--json")
    assert answered.code == 0, answered.err
    found = answered.json["latency"]
    assert found["scenario"] == FORWARD
    assert found["measured"]["ms"] == pytest.approx(found["predicted"]["ms"])
    assert 0.5 * whole < found["measured"]["ms"] <= found["limit_ms"]
