"""Absolute latencies of many models in one runtime: one worker loads each of them several times, in random order.

Single blocks are timed by differences between such models; there is no baseline to compare with in turn, so the visits
of each model are spread over the whole run, and the same model is measured at its start and its end.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from numprune.errors import EnvironmentInvalid
from numprune.progress import Progress
from numprune.serving.benchmark.client import Worker, start_worker
from numprune.serving.benchmark.contention import WAITED_SHARE, waited_share
from numprune.serving.benchmark.estimators import paired_ratio
from numprune.serving.benchmark.load import Load
from numprune.serving.benchmark.passes import Passes
from numprune.serving.benchmark.samples import Repeat
from numprune.serving.benchmark.scheduler import ThreadTimes
from numprune.serving.benchmark.shapes import EncoderLoad
from numprune.serving.benchmark.vllm.engines import engine_options, start_engine
from numprune.serving.report import Environment as Machine
from numprune.serving.report import capture, combine
from numprune.serving.vllm.environment import Environment

# A drift that is smaller than this, or that chance explains, widens the intervals: visits are spread over the run.
DRIFT = 0.05
QUIET = "stop other programs, let the machine cool down, and measure again"
_WARM, _STEPS = 2, 8  # decode steps of a visit: not counted, counted
_PREFILLS = 3  # or forward passes of a visit, after one that is not counted
_TIMEOUT_S = 1800.0
_DRAWS = 2000


@dataclass(frozen=True)
class Timed:
    """What is timed in a visit: a prefill of `batch` prompts of `tokens`, decode steps after it, both for `output`
    tokens, or forward passes.

    `tokens` of images are those that the model makes of one. `output`: of a request.
    """

    phase: Literal["prefill", "decode", "request", "forward"]
    batch: int
    tokens: int
    output: int | None = None

    def load(self) -> Load | EncoderLoad:
        """Return one pass over the batch, or all that a visit times of an encoder."""
        if self.phase == "forward":
            return EncoderLoad(batch_sizes=(self.batch,), lengths=(self.tokens,), passes=1 + _PREFILLS)
        output = self.output or (2 if self.phase == "prefill" else 1 + _WARM + _STEPS)
        return Load(prompts=self.batch, batch_size=self.batch, prompt_length=self.tokens, output_length=output)


@dataclass(frozen=True)
class Runtime:
    """The runtime of every model, its device ("auto", "cpu" or "cuda") and precision; torch decodes eagerly.

    `vllm`: the environment with vLLM, if it is the runtime; `tensor_parallel` devices then share each layer.
    """

    name: str
    device: str
    dtype: str
    vllm: Environment | None = None
    tensor_parallel: int = 1

    def start(self) -> AbstractContextManager[Worker]:
        """Start the worker that `visit` needs."""
        name = f"timings in {self.name}"
        return start_engine(self.vllm, name, _TIMEOUT_S) if self.vllm else start_worker(name, _TIMEOUT_S)

    def load(self, worker: Worker, folder: Path, loads: Sequence[Load | EncoderLoad]) -> int:
        """Load the model in `folder` for all loads; returns its vocabulary. Raises as `visit`."""
        if self.vllm:
            generated = [load for load in loads if isinstance(load, Load)]
            options = engine_options(self.vllm, folder, generated, self.dtype, self.tensor_parallel)
            opened = worker.ask("load", folder=str(folder), options=options)
        else:
            opened = worker.ask(
                "load",
                folder=str(folder),
                runtime=self.name,
                device=self.device,
                threads=None,
                dtype=self.dtype,
                encoder=any(isinstance(load, EncoderLoad) for load in loads),
            )
        return int(opened["vocabulary"])


@dataclass(frozen=True)
class Visit:
    """The median milliseconds of everything that was timed, by name, and what the threads did meanwhile."""

    ms: dict[str, float]
    threads: ThreadTimes


def visit(worker: Worker, runtime: Runtime, folder: Path, timed: Mapping[str, Timed]) -> Visit:
    """Load the model in `folder` and time it. Raises InputError, MissingRuntime, WorkerError as `run_benchmark`."""
    loads = {name: one.load() for name, one in timed.items()}
    vocabulary = runtime.load(worker, folder, [*loads.values()])
    found: dict[str, float] = {}
    spent: list[ThreadTimes] = []
    for name, one in timed.items():
        worker.ask(loads[name].prepares, **loads[name].work(vocabulary))
        answers = [worker.ask("repeat") for _ in range(1 if one.phase in ("decode", "forward") else 1 + _PREFILLS)]
        spent += [ThreadTimes(**answer["threads"]) for answer in answers]
        found[name] = statistics.median(_latencies(one.phase, answers))
    ran_s, waited_s = sum(one.ran_s for one in spent), sum(one.waited_s for one in spent)
    return Visit(found, ThreadTimes(ran_s, waited_s))


def _latencies(phase: str, answers: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return the milliseconds that count."""
    if phase == "forward":
        return [one.latency_ms for one in Passes.from_json(answers[0]).passes[1:]]
    batches = [Repeat.from_json(answer).batches[0] for answer in answers]
    if phase == "decode":
        return batches[0].itl_ms[_WARM:]
    return [batch.e2e_ms if phase == "request" else batch.ttft_ms for batch in batches[1:]]


def in_turn(runtime: Runtime, sides: Mapping[str, Path], timed: Timed, visits: int) -> dict[str, list[float]]:
    """Return the milliseconds of each side in every visit, made in turn: A B B A …

    Raises:
        EnvironmentInvalid: the machine is busy, or its GPU throttles.
        InputError, MissingRuntime, WorkerError: as `visit`.
    """
    found: dict[str, list[Visit]] = {name: [] for name in sides}
    total = len(sides) * visits
    with runtime.start() as worker, Progress(total, f"latencies ({runtime.name})", "visit") as bar:
        before = capture(uses_gpu=runtime.device == "cuda", own_processes=[worker.pid])
        for number in range(visits):
            for name, folder in [*sides.items()][:: -1 if number % 2 else 1]:
                found[name].append(visit(worker, runtime, folder, {"": timed}))
                bar.update()
        after = capture(uses_gpu=runtime.device == "cuda", own_processes=[worker.pid])
    check_quiet(one for made in found.values() for one in made)
    check_state(before, after)
    return {name: [one.ms[""] for one in made] for name, made in found.items()}


def check_state(before: Machine, after: Machine) -> None:
    """Raise EnvironmentInvalid if the machine was in no state to measure, at the start of a run or at its end."""
    found = combine(before, after)
    if not found.valid:
        raise EnvironmentInvalid(f"{'; '.join(found.reasons)}; {QUIET}")


def check_quiet(visits: Iterable[Visit]) -> None:
    """Raise EnvironmentInvalid if the worker did not get the CPU time that it asked for."""
    waited = waited_share(one.threads for one in visits)
    if waited is not None and waited > WAITED_SHARE:
        raise EnvironmentInvalid(
            f"the machine is too busy: the worker waited for a CPU {waited:.0%} of its time (limit "
            f"{WAITED_SHARE:.0%}); {QUIET}"
        )


def order(models: Sequence[str], visits: int, seed: int) -> list[tuple[str, int]]:
    """Return every visit, (model, its number): rounds over all models, each in a random order of its own."""
    generator = np.random.default_rng(seed)
    return [(models[index], number) for number in range(visits) for index in generator.permutation(len(models))]


def weighted_medians(
    latencies: Sequence[Sequence[float]], weights: Sequence[float], seed: int = 0
) -> tuple[float, tuple[float, float]]:
    """Return a weighted sum of median latencies and its 95 % percentile-bootstrap interval over visits.

    Args:
        latencies: (models, visits).
        weights: (models,) of their medians.
        seed: of the draws. A draw takes the same visits of all models: those of one round are close in time.
    """
    values, factors = np.array(latencies), np.array(weights)
    drawn = np.random.default_rng(seed).integers(0, values.shape[1], (_DRAWS, values.shape[1]))
    medians = np.median(values[:, drawn], axis=2)  # (models, draws)
    low, high = np.quantile(factors @ medians, [0.025, 0.975]).tolist()
    return float(factors @ np.median(values, axis=1)), (low, high)


def drift(start: Sequence[float], end: Sequence[float]) -> float:
    """Return the latency of one model at the end of a run, relative to its start.

    Raises:
        EnvironmentInvalid: it differs by more than DRIFT, and by more than its own visits explain.
    """
    ratio = paired_ratio(end, start)
    low, high = ratio["interval95"]
    if abs(ratio["value"] - 1) > DRIFT and not low <= 1 <= high:
        raise EnvironmentInvalid(
            f"the machine is too noisy: the same model took {ratio['value']:.1%} of its time at the start "
            f"(95 % interval {low:.1%} to {high:.1%}; limit {DRIFT:.0%} from 100 %); {QUIET}"
        )
    return float(ratio["value"])
