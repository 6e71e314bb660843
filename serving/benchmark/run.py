"""Benchmark baseline and candidate side by side: the same prompts, in turn, each in its own process."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, TypeVar

from numprune.errors import InputError
from numprune.progress import Progress
from numprune.serving.benchmark.client import Worker, start_worker
from numprune.serving.benchmark.contention import Contention, StolenTime, waited_share
from numprune.serving.benchmark.load import Load, interleaving
from numprune.serving.benchmark.passes import Passes, passes_section
from numprune.serving.benchmark.samples import Repeat
from numprune.serving.benchmark.scheduler import ThreadTimes, standing_still
from numprune.serving.benchmark.sections import Look, Section, memory_section, speed_section
from numprune.serving.benchmark.shapes import EncoderLoad
from numprune.serving.report import capture, combine

R = TypeVar("R", Repeat, Passes)

TorchMode = Literal["auto", "eager", "compiled"]

logger = logging.getLogger(__name__)

_COMPILING = 6  # times the limit of other responses
_SIDES = {"A": "baseline", "B": "candidate"}


def run_benchmark(
    candidate: Path,
    baseline: Path,
    runtime: str,
    load: Load | EncoderLoad | None = None,
    *,
    device: str = "auto",
    threads: int | None = None,
    dtype: str = "float32",
    torch_mode: TorchMode = "auto",
    timeout_s: float = 600.0,
) -> dict[str, Any]:
    """Measure both, interleaved A B B A …, and return plain JSON:

    - `speed`, `memory`: the report's sections for this runtime; - `environment`: the report's section, with reasons
    from before, during and after the measurement; - `samples`: every repeat, warm-up included, load times, and CPU
    contention of both sides.

    The interval covers repeats in one pair of processes. Differences between two processes of the same model, such as
    memory layout, are in neither the interval nor the noise floor: only running the benchmark again shows them.

    Args:
        candidate: a folder that `runtime` opens.
        baseline: another one, or the same one to measure the noise.
        runtime: as for `numprune.export.runtimes.open_runtime`, like `device`, `threads` and `dtype`.
        torch_mode: how torch decodes: "eager", "compiled", or "auto": compiled on a GPU. Both sides use the same mode:
            if one cannot be compiled, both decode eagerly, and their descriptions give the reason.
        load: the work, for decoders or encoders; `Load()` by default.
        timeout_s: limit for one response of a worker (loading the model, one repeat); six times that for compiling.

    Raises:
        InputError: a folder is missing or the runtime refuses it, or the two are not comparable.
        MissingRuntime: its libraries or device are missing.
        WorkerError: a process ended or hung; the message has its last lines.
    """
    load = load or Load()
    folders = {"baseline": baseline, "candidate": candidate}
    for name, folder in folders.items():
        if not folder.is_dir():
            raise InputError(f"{name} {str(folder)!r} is not a folder; give one that {runtime} can open")
        _check_context(folder, load)
    with ExitStack() as stack:
        # Both start together, because importing takes most of the time; they load one after the other, so that neither
        # load affects the other's time or GPU memory.
        workers = {
            name: stack.enter_context(start_worker(f"{name} {folder}", timeout_s)) for name, folder in folders.items()
        }
        opened = {
            name: worker.ask(
                "load",
                folder=str(folders[name]),
                runtime=runtime,
                device=device,
                threads=threads,
                dtype=dtype,
                encoder=isinstance(load, EncoderLoad),
            )
            for name, worker in workers.items()
        }
        check_match(opened["baseline"], opened["candidate"])
        on_gpu = opened["baseline"]["gpu"]
        compiled = torch_mode == "compiled" or (torch_mode == "auto" and on_gpu)
        if compiled and runtime == "torch" and isinstance(load, Load):
            for name, description in _compile(workers, load, _COMPILING * timeout_s).items():
                opened[name]["description"] = description
        for worker in workers.values():
            worker.ask(load.prepares, **load.work(opened["baseline"]["vocabulary"]))
        return _measure(load, runtime, workers, opened)


def _compile(workers: Mapping[str, Worker], load: Load, timeout_s: float) -> dict[str, Any]:
    """Compile both sides or neither; return the description of each."""
    logger.info("compiling both sides, about a minute each; torch_mode = eager skips this")
    answers = {}
    for name, worker in workers.items():  # both, even after a failure: the attempt takes memory
        worker.send("compile", rows=load.batch_size, positions=load.positions)
        answers[name] = worker.receive(timeout_s)
    reasons = [
        f"the {name} cannot be compiled: {answer['reason']}"
        for name, answer in answers.items()
        if answer["reason"] is not None
    ]
    if reasons:
        reason = "; ".join(reasons)
        logger.warning("%s; both sides decode eagerly", reason)
        answers = {name: worker.ask("decode_eagerly", reason=reason) for name, worker in workers.items()}
    return {name: answer["description"] for name, answer in answers.items()}


def pool(looks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Pool several results of `run_benchmark` with the same load: speed over all repeats, the rest from the last.

    Raises InputError if torch decoded compiled in some and eagerly in others.
    """
    modes = {side["mode"] for look in looks for side in look["speed"]["runtime"].values() if "mode" in side}
    if len(modes) > 1:
        raise InputError(
            f"torch decoded in different modes ({', '.join(sorted(modes))}) so the looks cannot be pooled; set "
            "benchmark.torch_mode = 'eager', which measures again"
        )
    last = looks[-1]
    load = load_of(last["speed"]["load"])
    read, section = _kind(load)
    repeats = [
        Look(*([read(repeat) for repeat in look["samples"][side]["repeats"]] for side in _SIDES.values()))
        for look in looks
    ]
    speed = section(load, repeats, last["speed"]["runtime"])
    return {**last, "speed": {**speed, "dtype": last["speed"]["dtype"]}}


def _kind(load: Load | EncoderLoad) -> tuple[Callable[[Mapping[str, Any]], Any], Callable[..., Section]]:
    """How repeats of this load are read and turned into a section."""
    if isinstance(load, EncoderLoad):
        return Passes.from_json, passes_section
    return Repeat.from_json, speed_section


def load_of(facts: Mapping[str, Any]) -> Load | EncoderLoad:
    """A load from its fields, as in a recipe or from `describe`. Raises InputError like the load classes."""
    if "batch_sizes" not in facts:
        return Load(**facts)
    lists = {name: tuple(facts[name]) for name in ("batch_sizes", "lengths")}
    return EncoderLoad(**{**facts, **lists})


def _check_context(folder: Path, load: Load | EncoderLoad) -> None:
    """Raises InputError if the load needs more positions than config.json allows."""
    config = folder / "config.json"
    if not config.is_file():
        return  # what a folder must contain is up to the runtime
    try:
        context = json.loads(config.read_text(encoding="utf-8"))["max_position_embeddings"]
    except (ValueError, KeyError, TypeError):
        return  # as above
    if isinstance(context, int) and load.positions > context:
        raise InputError(
            f"{load.asked} need {load.positions} positions, but {config} has max_position_embeddings = {context}"
        )


def check_match(baseline: Mapping[str, Any], candidate: Mapping[str, Any]) -> None:
    """Raises InputError if the two loaded models cannot be compared."""
    if baseline["vocabulary"] != candidate["vocabulary"]:
        raise InputError(
            f"the vocabulary of the baseline has {baseline['vocabulary']} tokens, that of the candidate "
            f"{candidate['vocabulary']}: they cannot run the same prompts"
        )
    if baseline["gpu"] != candidate["gpu"]:
        where = {True: "the GPU", False: "the CPU"}
        raise InputError(
            f"the baseline runs on {where[baseline['gpu']]}, the candidate on {where[candidate['gpu']]}: "
            "use the same device for both"
        )


def _measure(
    load: Load | EncoderLoad, runtime: str, workers: Mapping[str, Worker], opened: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    read, section = _kind(load)
    machine = {"uses_gpu": opened["baseline"]["gpu"], "own_processes": [worker.pid for worker in workers.values()]}
    with Progress(2 * (load.warmup + load.repeats), f"benchmark ({runtime})", "run", leave=True) as bar:
        warmup = _interleaved(load.warmup, workers, bar, read)
        before, stolen = capture(**machine), StolenTime()
        repeats = _interleaved(load.repeats, workers, bar, read)
        stolen_share, after = stolen.share(), capture(**machine)
    finished = {name: worker.ask("finish") for name, worker in workers.items()}

    waited = {
        name: waited_share(ThreadTimes(one.ran_s, one.waited_s) for one in found) for name, found in repeats.items()
    }
    contention = Contention(waited["baseline"], waited["candidate"], stolen_share)
    environment = combine(before, after)
    reasons = (*environment.reasons, *contention.reasons)
    environment = environment.model_copy(update={"valid": not reasons, "reasons": reasons})
    descriptions = {name: answer["description"] for name, answer in opened.items()}
    return {
        "speed": {
            **section(load, [Look(**repeats)], descriptions),
            "dtype": {name: description["dtype"] for name, description in descriptions.items()},
        },
        "memory": memory_section(**{name: {**opened[name], **finished[name]} for name in workers}),
        "environment": environment.model_dump(mode="json"),
        "samples": {
            "contention": contention.describe(),
            **{
                name: {
                    "opened": opened[name],
                    "warmup": [repeat.to_json() for repeat in warmup[name]],
                    "repeats": [repeat.to_json() for repeat in repeats[name]],
                }
                for name in workers
            },
        },
    }


def _interleaved(
    count: int, workers: Mapping[str, Worker], bar: Progress, read: Callable[[Mapping[str, Any]], R]
) -> dict[str, list[R]]:
    """Run `count` repeats of each side in turn, while the other side is suspended."""
    repeats: dict[str, list[R]] = {name: [] for name in workers}
    for letter in interleaving(count):
        name = _SIDES[letter]
        with standing_still(worker.pid for other, worker in workers.items() if other != name):
            repeats[name].append(read(workers[name].ask("repeat")))
        bar.update()
    return repeats
