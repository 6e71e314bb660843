"""numprune timings and pruning to a budget of time, from the command line."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from numprune.anatomy import read_anatomy
from numprune.axes import Limits
from numprune.configs import pruned_config
from numprune.errors import DiskError, EnvironmentInvalid, InputError, MissingRuntime
from numprune.export import checkpoint, disk, locks, manifest
from numprune.export.files import CARD
from numprune.export.random_weights import write_random
from numprune.flows.bundle import CHECKPOINT
from numprune.flows.chain import learn, time_blocks
from numprune.flows.names import LEARNED, ROOFLINE, TIMINGS, TRAINING_LOCK
from numprune.flows.recipe import load
from numprune.flows.run import prepare
from numprune.flows.stages import RESULT, Artifact, StageResult, Text, place_of, read_facts
from numprune.flows.steps import bodies, timed_prune, timings
from numprune.flows.steps.estimates import estimate_key
from numprune.flows.steps.report import pruning_section
from numprune.flows.steps.results import TimedCheckpoint
from numprune.flows.steps.timings import Request, key_of, measure, runtime_of
from numprune.plans import PLAN_FILE, read_plan
from numprune.scenario import Scenario, parse_scenario
from numprune.serving.benchmark import visits
from numprune.serving.benchmark.scheduler import ThreadTimes
from numprune.serving.benchmark.visits import Runtime, Visit
from numprune.serving.vllm import environment
from numprune.serving.vllm.environment import Environment
from numprune.slices import Size
from numprune.target import Target, allowed_sizes
from numprune.time_budget import TimeBudget
from numprune.timings import BlockTime, ScenarioTimes, Time, TimingTable, read_timings
from tests.conftest import build_tiny, write_checkpoint
from tests.flows.conftest import RECIPE, Answered, write_inputs
from tests.serving.releases import require_vllm

Command = Callable[..., Answered]
DECODE = "decode,b=1,ctx=16"
FORWARD = "forward,b=2,len=16"
SAMPLED = ("--samples", 8, "--sequence-length", 64)
AROUND_MS = 3.0


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("timings"), build_tiny(), RECIPE.replace("ratio = 0.25\n", ""))


def latency(config: Any) -> float:
    """Of a machine on which a step takes AROUND_MS, and a microsecond for each prunable parameter."""
    anatomy = read_anatomy(config)
    return AROUND_MS + 1e-3 * sum(block.parameters(block.size) for block in anatomy.blocks)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands in for the clock: `visits` are those that were made; `slow`: factor of later ones; `dies_after` visits;
    the `odd` ones see no difference between models.
    """
    state = SimpleNamespace(visits=[], slow=1.0, dies_after=10**6, odd=range(0))

    def clock(_worker: Any, _runtime: Runtime, folder: Path, timed: Any) -> Visit:
        if len(state.visits) == state.dies_after:
            raise KeyboardInterrupt
        state.visits.append(folder.name)
        whole = AROUND_MS if len(state.visits) - 1 in state.odd else latency(checkpoint.read_config(folder))
        ms = whole * state.slow ** len(state.visits)
        return Visit(dict.fromkeys(timed, ms), ThreadTimes(1, 0))

    @contextmanager
    def no_worker(_runtime: Runtime) -> Iterator[SimpleNamespace]:
        yield SimpleNamespace(pid=1)

    monkeypatch.setattr(timings, "visit", clock)
    monkeypatch.setattr(Runtime, "start", no_worker)
    return state


def asked(**changes: Any) -> Request:
    return Request(
        **{
            "runtime": "torch",
            "scenarios": [Scenario("decode", 1, 16)],
            "target": Target(align=32),
            "sizes": 3,
            "visits": 3,
            "seed": 0,
            **changes,
        }
    )


def test_differences_between_models_are_the_times_of_blocks(
    inputs: Path, tmp_path: Path, machine: SimpleNamespace
) -> None:
    table = measure(inputs / "base", asked(), tmp_path)
    anatomy = read_anatomy(checkpoint.read_config(inputs / "base"))
    times = table.times(DECODE)
    assert times.around.ms == pytest.approx(AROUND_MS)
    assert times.blocks.keys() == {"attention", "mlp"}
    for kind, measured in times.blocks.items():
        block = anatomy.of_kind(kind)[0]
        assert block.size in [time.size for time in measured]
        for time in measured:
            assert time.ms == pytest.approx(1e-3 * block.parameters(time.size))
            assert time.interval95 == pytest.approx((time.ms, time.ms))
    assert table.drift == {DECODE: 1.0}
    assert table.key == key_of(inputs / "base", "torch")
    assert not list(tmp_path.iterdir())


def test_a_killed_measurement_goes_on_where_it_stopped(inputs: Path, tmp_path: Path, machine: SimpleNamespace) -> None:
    undisturbed = measure(inputs / "base", asked(), tmp_path)
    everything, machine.visits = len(machine.visits), []
    machine.dies_after = 3 + 10  # of the anchor, and of other models
    with pytest.raises(KeyboardInterrupt):
        measure(inputs / "base", asked(), tmp_path)
    (kept,) = tmp_path.glob(f"{TIMINGS}*")
    assert len(list(kept.glob("*.visit-*.json"))) == 10
    with locks.held(kept / TRAINING_LOCK), pytest.raises(Exception, match="another process is running the same meas"):
        measure(inputs / "base", asked(), tmp_path)
    machine.dies_after = 10**6
    machine.visits = []
    assert measure(inputs / "base", asked(), tmp_path) == undisturbed
    assert len(machine.visits) == everything - 10  # the anchor is measured again at the start
    assert not list(tmp_path.iterdir())


def test_more_visits_continue_a_measurement_that_was_too_noisy(
    inputs: Path, tmp_path: Path, machine: SimpleNamespace
) -> None:
    undisturbed = measure(inputs / "base", asked(visits=7), tmp_path)
    models = (len(machine.visits) - 6) // 7
    machine.visits, machine.odd = [], range(3, 3 + 3 * models)
    with pytest.raises(EnvironmentInvalid, match=r"too noisy: attention of .* measure again with more visits"):
        measure(inputs / "base", asked(visits=3), tmp_path)
    machine.visits, machine.odd = [], range(0)
    table = measure(inputs / "base", asked(visits=7), tmp_path)
    assert len(machine.visits) == 6 + 4 * models
    for times, others in zip(table.scenarios[0].blocks.values(), undisturbed.scenarios[0].blocks.values(), strict=True):
        assert [time.ms for time in times] == pytest.approx([time.ms for time in others])  # medians
    assert not list(tmp_path.iterdir())


def test_a_disk_without_room_for_all_models_is_refused_first(
    inputs: Path, tmp_path: Path, machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_one = checkpoint.weight_bytes(inputs / "base")  # or less
    monkeypatch.setattr(disk, "free_bytes", lambda _: 2 * of_one)
    with pytest.raises(DiskError, match=f"bytes are needed, {2 * of_one:,} are free"):
        measure(inputs / "base", asked(), tmp_path)
    assert not [*tmp_path.rglob("*.safetensors")]


def test_a_machine_that_slows_down_is_refused(
    numprune: Command, inputs: Path, tmp_path: Path, machine: SimpleNamespace
) -> None:
    machine.slow = 1.01  # with every visit
    command = ("timings", inputs / "base", "--runtime", "torch", "--scenario", DECODE, "--sizes", 2, "--align", 32)
    answered = numprune(*command, "--visits", 3, "--out", tmp_path / "table.json", "--json")
    assert answered.code == 4
    assert "the machine is too noisy: the same model took" in answered.err
    assert "stop other programs" in answered.err
    assert not list(tmp_path.iterdir())


def ignore_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure really, although other programs may disturb it."""
    monkeypatch.setattr(visits, "DRIFT", 1e9)
    monkeypatch.setattr(visits, "WAITED_SHARE", 1.0)
    monkeypatch.setattr(timings, "_positive", lambda ms, interval, _: Time(ms=abs(ms) + 1e-9, interval95=interval))


@pytest.mark.slow
def test_the_command_writes_a_table(
    numprune: Command, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ignore_noise(monkeypatch)
    command = ("timings", inputs / "base", "--runtime", "onnxruntime", "--scenario", DECODE, "prefill,b=2,len=8")
    out = tmp_path / "table.json"
    answered = numprune(*command, "--sizes", 2, "--align", 32, "--visits", 3, "--out", out, "--json")
    assert answered.code == 0, answered.err
    table = read_timings(out)
    assert answered.json["key"] == table.key.model_dump()
    assert [times.scenario for times in table.scenarios] == [DECODE, "prefill,b=2,len=8"]
    assert [len(table.scenarios[0].blocks[kind]) for kind in ("attention", "mlp")] == [2, 2]
    refused = numprune(*command, "--out", out)
    assert refused.code == 1
    assert "already exists" in refused.err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--scenario", "decode,b=1"), "scenario is 'decode,b=1'; it must be decode,b=BATCH,ctx=TOKENS"),
        (("--scenario", FORWARD), "for the task causal-lm it must be decode,b=BATCH,ctx=TOKENS or prefill"),
        (("--scenario", DECODE, DECODE), "the same scenario is given twice"),
        (("--scenario", "decode,b=1,ctx=99999"), "needs 100009 positions, and the model has 256"),
        (("--scenario", DECODE, "--sizes", 13), "13 must be from 2 to 12"),
    ],
)
def test_requests_that_make_no_sense_are_refused(
    numprune: Command, inputs: Path, tmp_path: Path, options: tuple[object, ...], says: str
) -> None:
    answered = numprune("timings", inputs / "base", "--runtime", "torch", "--out", tmp_path / "out.json", *options)
    assert answered.code == 1
    assert says in answered.err


def write_table(base: Path, out: Path, factor: float, scenario: str = DECODE, **changes: Any) -> float:
    """Write a table that would be right on a machine `factor` times as fast as that of `latency`; return the whole."""
    anatomy = read_anatomy(checkpoint.read_config(base))
    allowed = allowed_sizes(anatomy, Target(), Limits())
    blocks: dict[str, list[BlockTime]] = {}
    for kind in anatomy.kinds:
        block = anatomy.of_kind(kind)[0]
        for size in allowed[block.name]:
            ms = factor * 1e-3 * block.parameters(size)
            if size.units:
                time = BlockTime(units=size.units, members=size.members, ms=ms, interval95=(ms, ms))
                blocks.setdefault(kind, []).append(time)
    around = Time(ms=factor * AROUND_MS, interval95=(factor * AROUND_MS, factor * AROUND_MS))
    times = ScenarioTimes(scenario=scenario, around=around, blocks=blocks)
    key = key_of(base, "torch").model_copy(update=changes)
    table = TimingTable(key=key, copies={"mlp": 2}, visits=3, drift={scenario: 1.0}, scenarios=[times])
    out.write_text(table.to_json())
    return factor * latency(checkpoint.read_config(base))


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


def command_of(inputs: Path, out: Path, limit_ms: float) -> tuple[object, ...]:
    budget = ("--budget", f"{limit_ms}ms@{DECODE}", "--timings", out / "table.json")
    fitting = ("--compensation", "oneshot", *SAMPLED, "--text", inputs / "train.txt")
    return ("prune", inputs / "base", out / "pruned", *budget, *fitting)


def benchmark_on(monkeypatch: pytest.MonkeyPatch, factor: Callable[[int], float]) -> None:
    """Have the benchmark find the latencies of `latency`, times `factor` of the number of benchmarks."""
    looks = []

    def benchmark(candidate: Path, baseline: Path, *_: Any, **__: Any) -> dict[str, Any]:
        looks.append(candidate)
        sides = {"candidate": candidate, "baseline": baseline}
        ms = {side: factor(len(looks)) * latency(checkpoint.read_config(folder)) for side, folder in sides.items()}
        speed = {side: {"by_repeat": {"itl": [one] * 4, "latency": [one] * 4}} for side, one in ms.items()}
        return {"speed": speed, "environment": {"valid": True, "reasons": []}}

    monkeypatch.setattr(timed_prune, "run_benchmark", benchmark)


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
    bodies.make_calibration(
        places["rows"], model=base, text=text, samples=8, sequence_length=64, seed=0, reading=reading
    )
    named: dict[str, Any] = {"asked": recipe.timings, "target": recipe.sizes(), "machine": {}}
    table = bodies.make_timings(places["times"], model=Text(str(base.path), ""), scenario=DECODE, **named)
    (places["times"] / RESULT).write_text(table.model_dump_json())
    rows, times = (Artifact(places[name], "") for name in ("rows", "times"))
    named |= {"asked": recipe.prune, "device": "cpu"}
    named |= {"base": base, "origin": base, "rows": rows, "times": times}
    made = bodies.make_pruned_within_time(places["pruned"], learned=None, **named)
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
    bodies.make_calibration(
        rows,
        model=Artifact(base, ""),
        text=Text([str(inputs / "train.txt")], ""),
        samples=8,
        sequence_length=64,
        seed=0,
        reading=recipe.data.reading(),
    )

    def pruned(name: str) -> TimedCheckpoint:
        return bodies.make_pruned_within_time(
            tmp_path / name,
            base=Artifact(base, ""),
            origin=Artifact(base, ""),
            rows=Artifact(rows, ""),
            times=Artifact(tmp_path, ""),
            learned=Artifact(learned / LEARNED, ""),
            asked=recipe.prune,
            target=recipe.sizes(),
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


def test_a_stage_measures_again_where_its_table_would_be_refused(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load(inputs / "recipe.toml", [f"prune.budget=5ms@{DECODE}"])

    def place() -> Path:
        return place_of(tmp_path / "w", time_blocks(prepare(recipe, tmp_path / "w"))).path

    here = place()
    assert place() == here
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    with_more_threads = place()
    monkeypatch.setattr(timings, "capture", lambda: SimpleNamespace(cpu="another CPU"))
    assert len({here, with_more_threads, place()}) == 3


def test_a_forecast_has_the_measurement(numprune: Command, inputs: Path, tmp_path: Path) -> None:
    asked = ("--set", f"prune.budget=5ms@{DECODE}", "--workspace", tmp_path / "w")
    answered = numprune("plan", inputs / "recipe.toml", *asked)
    assert answered.code == 0, answered.err
    assert f"budget 5ms@{DECODE}, among sizes that are measured" in answered.out
    lines = [line.split()[0] for line in answered.out.splitlines()]
    assert lines.index("timings") < lines.index("prune")
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
        ([f"prune.budget=5ms@{DECODE}", "quantize.scheme=w8a8"], "quantize.scheme = 'w8a8': with a time"),
        ([f"prune.budget=5ms@{DECODE}", "target.tensor_parallel=2"], "tensor_parallel = 2: with a time"),
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


@pytest.mark.parametrize(
    ("family", "scenario", "kinds"),
    [
        ("bert", FORWARD, {"attention", "mlp"}),
        ("vit", "forward,b=2", {"attention", "mlp"}),
        ("gpt_oss", DECODE, {"sliding-attention", "attention", "experts"}),
    ],
)
def test_encoders_experts_and_windows_are_timed(
    tmp_path: Path, machine: SimpleNamespace, family: str, scenario: str, kinds: set[str]
) -> None:
    windows = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
    model = build_tiny(family, **(windows if family == "gpt_oss" else {}))
    base = write_checkpoint(model, tmp_path / "base")
    table = measure(base, asked(scenarios=[parse_scenario(scenario)], sizes=2), tmp_path)
    assert table.times(scenario).blocks.keys() == kinds
    assert table.routing == ("uniform" if "experts" in kinds else None)
    predicted = TimeBudget(1, table.times(scenario), "torch").predicted(read_anatomy(model.config)).ms
    assert predicted == pytest.approx(latency(model.config))
    assert table.key.shape.task == read_anatomy(model.config).task
    assert {path.name for path in tmp_path.iterdir()} == {"base"}


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


@pytest.mark.slow
def test_forward_passes_are_really_measured(numprune: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ignore_noise(monkeypatch)
    base, table = write_checkpoint(build_tiny("vit"), tmp_path / "base"), tmp_path / "table.json"
    sizes = ("--sizes", 2, "--align", 32, "--visits", 3)
    answered = numprune("timings", base, "--runtime", "torch", "--scenario", "forward,b=2", *sizes, "--out", table)
    assert answered.code == 0, answered.err
    assert [len(times) for times in read_timings(table).times("forward,b=2").blocks.values()] == [2, 2]


@pytest.mark.vllm
def test_models_are_timed_in_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Really measured: the dense model, and one whose layers differ."""
    found = require_vllm()
    assert found.plugin
    monkeypatch.setenv("NUMPRUNE_VLLM", str(found.python.parent.parent))
    ignore_noise(monkeypatch)
    base = write_checkpoint(build_tiny(head_dim=32), tmp_path / "base")
    anatomy = read_anatomy(checkpoint.read_config(base))
    sizes = {block.name: Size(1, 1 + block.layer) for block in anatomy.of_kind("attention")}
    sizes |= {block.name: Size(32) for block in anatomy.of_kind("mlp")}
    smaller = pruned_config(checkpoint.read_config(base), anatomy.keeping(sizes))
    write_random(tmp_path / "smaller", smaller, base, torch.float32)
    used = runtime_of(base, "vllm")
    assert used == Runtime("vllm", "cpu" if found.cpu else "cuda", "float32", found)
    decode, prefill = visits.Timed("decode", 3, 16), visits.Timed("prefill", 2, 40)
    with used.start() as worker:  # importing vLLM takes long
        made = visits.visit(worker, used, base, {"decode": decode, "prefill": prefill})
        with pytest.raises(InputError, match="timings in vllm: the batch is 5000, and vLLM runs at most"):
            worker.ask("prepare", token_ids=[[1]] * 5000, batch_size=5000, output_length=2)
        monkeypatch.setattr(Runtime, "start", lambda _: nullcontext(worker))
        ms = visits.in_turn(used, {"base": base, "smaller": tmp_path / "smaller"}, decode, 1)
    assert made.ms.keys() == {"decode", "prefill"}
    assert {name: len(found) for name, found in ms.items()} == {"base": 1, "smaller": 1}
    assert min(*made.ms.values(), *ms["base"], *ms["smaller"], made.threads.ran_s) > 0


def test_a_budget_in_vllm_is_confirmed_in_engines(
    numprune: Command, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Environment(tmp_path / "bin" / "python", "0.32.0", cpu=True, plugin="0.1.0", router=None)
    monkeypatch.setattr(environment, "find", lambda: found)
    looks: list[visits.Timed] = []

    def in_turn(runtime: Runtime, sides: dict[str, Path], timed: visits.Timed, count: int) -> dict[str, list[float]]:
        assert runtime.vllm == found
        looks.append(timed)
        return {side: [latency(checkpoint.read_config(folder))] * count for side, folder in sides.items()}

    monkeypatch.setattr(timed_prune, "in_turn", in_turn)
    of_vllm = key_of(inputs / "base", "vllm")
    whole = write_table(inputs / "base", tmp_path / "table.json", 1.0, **vars(of_vllm))
    answered = numprune(*command_of(inputs, tmp_path, 0.8 * whole), "--json")
    assert answered.code == 0, answered.err
    assert looks == [visits.Timed("decode", 1, 16)]
    measured = answered.json["latency"]
    assert measured["runtime"] == "vllm"
    assert measured["measured"]["ms"] == pytest.approx(measured["predicted"]["ms"])
    assert measured["dense_measured"]["ms"] == pytest.approx(whole)


def test_a_table_of_vllm_names_its_version_and_plug_in(
    tmp_path: Path, machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Environment(tmp_path / "bin" / "python", "0.32.0", cpu=True, plugin="0.1.0", router=None)
    monkeypatch.setattr(environment, "find", lambda: found)
    base = write_checkpoint(build_tiny(head_dim=32), tmp_path / "base")
    table = measure(base, asked(runtime="vllm", sizes=2), tmp_path)
    assert table.key == key_of(base, "vllm")
    assert (table.key.implementation, table.key.versions) == ("plug-in", {"vllm": "0.32.0", "numprune-vllm": "0.1.0"})
    assert table.key.dtype == "float32"
    assert table.times(DECODE).around.ms == pytest.approx(AROUND_MS)


def test_an_estimate_chooses_sizes_and_says_everywhere_that_it_is_one(
    numprune: Command, inputs: Path, tmp_path: Path
) -> None:
    base, table = inputs / "base", tmp_path / "table.json"
    command = ("timings", base, "--peak-tflops", 1e-3, "--bandwidth", 1e-3, "--scenario", DECODE)
    answered = numprune(*command, "--align", 32, "--out", table)
    assert answered.code == 0, answered.err
    device = "a device of 0.001 TFLOP/s and 0.001 GB/s"
    assert f"estimated for {device} in float32, not measured" in answered.out
    found = read_timings(table)
    assert (found.estimate, found.visits, found.key.runtime) == (True, 0, ROOFLINE)
    whole = TimeBudget(1, found.times(DECODE), ROOFLINE).predicted(read_anatomy(checkpoint.read_config(base))).ms
    budget = ("--budget", f"{0.8 * whole:.6f}ms@{DECODE}", "--timings", table, "--compensation", "oneshot")
    text = (*SAMPLED, "--text", inputs / "train.txt")
    answered = numprune("prune", base, tmp_path / "pruned", *budget, *text)
    assert answered.code == 0, answered.err
    assert f"estimated for {device}, not measured" in answered.out
    assert f"estimated for {device}" in (tmp_path / "pruned" / CARD).read_text()
    answered = numprune("prune", base, "--plan-only", *budget, *text)
    assert f"estimated for {device}" in answered.out
    for word, instead in (('"estimate": true', '"estimate": false'), ('"visits": 0', '"visits": 3')):
        table.write_text(found.to_json().replace(word, instead))
        refused = numprune("prune", base, tmp_path / "again", *budget, *text)
        assert refused.code == 1
        assert "estimate, key.runtime and visits contradict each other" in refused.err


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["timings.runtime=roofline"], "needs a device, or both its peak"),
        (["timings.device=h200"], 'device: it has an effect only with runtime = "roofline"'),
        (
            [
                *("timings.runtime=roofline", "timings.device=h200"),
                'gates=[{metric="speed.torch.decode_tokens_per_s.ratio", bound="ci95_lower", min=1.05}]',
            ],
            "gates: speed.torch.decode_tokens_per_s.ratio can never pass, because timings.runtime = 'roofline'",
        ),
    ],
)
def test_recipes_with_estimates_are_refused_where_they_promise_a_speed(
    inputs: Path, overrides: list[str], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        load(inputs / "recipe.toml", [f"prune.budget=5ms@{DECODE}", *overrides])


def test_the_stage_of_a_recipe_estimates(numprune: Command, inputs: Path, tmp_path: Path) -> None:
    asked = [f"prune.budget=1us@{DECODE}", "timings.runtime=roofline", "timings.device=l4", "timings.sizes=4"]
    recipe = load(inputs / "recipe.toml", asked)
    named: dict[str, Any] = {"asked": recipe.timings, "target": recipe.sizes(), "machine": {}}
    table = bodies.make_timings(tmp_path, model=Text(str(inputs / "base"), ""), scenario=DECODE, **named)
    assert table.key == estimate_key(inputs / "base", "L4")
    assert prepare(recipe, tmp_path).timings_key == table.key.model_dump_json()
    answered = numprune("plan", inputs / "recipe.toml", *(part for one in asked for part in ("--set", one)))
    assert answered.code == 0, answered.err
    assert "among sizes that are estimated for L4, not measured" in answered.out


@pytest.mark.parametrize(
    ("family", "changes", "plugin", "says"),
    [
        ("llama", {"head_dim": 32}, None, "lacks the plug-in numprune-vllm"),
        ("llama", {"head_dim": 16}, "0.1.0", "heads of 32, 64, 80"),
        ("imagegpt", {}, "0.1.0", "vLLM does not run imagegpt"),
        ("llama", {"head_dim": 32, "dtype": "float64"}, "0.1.0", "is stored in float64"),
        ("bert", {}, "0.1.0", "vllm times generation"),
    ],
)
def test_models_that_vllm_cannot_time_are_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, changes: Any, plugin: str | None, says: str
) -> None:
    found = Environment(tmp_path / "bin" / "python", "0.32.0", cpu=True, plugin=plugin, router=None)
    monkeypatch.setattr(environment, "find", lambda: found)
    base = write_checkpoint(build_tiny(family, **changes), tmp_path / "base")
    scenario = parse_scenario(FORWARD if family == "bert" else DECODE)
    with pytest.raises((InputError, MissingRuntime), match=says):
        measure(base, asked(runtime="vllm", scenarios=[scenario]), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
