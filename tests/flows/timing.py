"""Models whose blocks are timed: a clock that stands in for the machine's, tables that fit it, and a recipe."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from numprune.anatomy import read_anatomy
from numprune.axes import Limits
from numprune.export import checkpoint
from numprune.flows.steps import timed_prune, timings
from numprune.flows.steps.timings import Request, key_of
from numprune.hidden import Width
from numprune.scenario import Scenario
from numprune.serving.benchmark import visits
from numprune.serving.benchmark.scheduler import ThreadTimes
from numprune.serving.benchmark.visits import Runtime, Visit
from numprune.target import Target, allowed_sizes
from numprune.timings import BlockTime, ScenarioTimes, Time, TimingTable, anatomy_at, shape_of
from tests.conftest import build_tiny
from tests.flows.conftest import RECIPE, write_inputs

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


def ignore_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure really, although other programs may disturb it."""
    monkeypatch.setattr(visits, "DRIFT", 1e9)
    monkeypatch.setattr(visits, "WAITED_SHARE", 1.0)
    monkeypatch.setattr(timings, "_positive", lambda ms, interval, _: Time(ms=abs(ms) + 1e-9, interval95=interval))


def write_table(
    base: Path, out: Path, factor: float, scenario: str = DECODE, width: Width | None = None, **changes: Any
) -> float:
    """Write a table that would be right on a machine `factor` times as fast as that of `latency`; return the whole."""
    anatomy = anatomy_at(read_anatomy(checkpoint.read_config(base)), width, Target())
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
    key = key_of(base, "torch").model_copy(update={"shape": shape_of(anatomy), **changes})
    table = TimingTable(key=key, copies={"mlp": 2}, visits=3, drift={scenario: 1.0}, scenarios=[times])
    out.write_text(table.to_json())
    return factor * latency(checkpoint.read_config(base))


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


def command_of(inputs: Path, out: Path, limit_ms: float) -> tuple[object, ...]:
    budget = ("--budget", f"{limit_ms}ms@{DECODE}", "--timings", out / "table.json")
    fitting = ("--compensation", "oneshot", *SAMPLED, "--text", inputs / "train.txt")
    return ("prune", inputs / "base", out / "pruned", *budget, *fitting)
