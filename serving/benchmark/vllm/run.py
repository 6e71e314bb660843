"""The measuring loop: every model on its own server, all started, one of them running at a time."""

import itertools
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from numprune.counted import counted
from numprune.errors import InputError, NumpruneError
from numprune.export import manifest, precision, processors, vllm
from numprune.export.checkpoint import audit, read_config
from numprune.progress import Progress
from numprune.serving.benchmark.contention import Contention, StolenTime
from numprune.serving.benchmark.scheduler import standing_still
from numprune.serving.benchmark.sections import Look
from numprune.serving.benchmark.vllm.client import Bench, start_bench
from numprune.serving.benchmark.vllm.load import ServedLoad
from numprune.serving.benchmark.vllm.requests import Requests, packed_share
from numprune.serving.benchmark.vllm.sections import memory_section, speed_section
from numprune.serving.benchmark.vllm.side import Side, side_of
from numprune.serving.energy import open_meter
from numprune.serving.report import Environment as Machine
from numprune.serving.report import capture, combine
from numprune.serving.vllm.environment import Environment
from numprune.serving.vllm.server import STARTUP_S, serving

BASELINE = "baseline"
_PACKED_SHARE = 0.25  # a busy server sends some tokens in pairs; beyond this share, TPOT measures the client
_FEW_CPUS = 3
_GPU_SHARE = 0.9  # share of the GPU's memory for all servers together


class BenchmarkFailed(NumpruneError):
    """More requests failed than the load allows; the message has the first one's error."""


def run_served(
    candidates: Mapping[str, Path],
    baseline: Path,
    environment: Environment,
    load: ServedLoad | None = None,
    *,
    dtype: str | None = None,
    options: Sequence[str] = (),
    startup_timeout_s: float = STARTUP_S,
) -> dict[str, dict[str, Any]]:
    """Measure all of them, interleaved A B B A … (with two candidates A B C C B A …), separately at each concurrency.

    Prefix caching is off, and every server gets the same memory for its KV cache. On CPUs all of them run eagerly,
    because compiling takes minutes.

    Args:
        candidates: by name, checkpoints that vLLM loads; not empty.
        baseline: a checkpoint with the same vocabulary.
        environment: the environment with vLLM.
        dtype: precision of all sides; None: each in that of its stored weights.
        options: of vLLM, for every server.
        startup_timeout_s: limit for a server to become ready.

    Returns:
        By candidate, the same keys as `run_benchmark` returns for other runtimes: `speed`, `memory`, `environment`,
        `samples`.

    Raises:
        InputError: a folder that vLLM cannot serve, or that does not match the load or the baseline.
        IntegrityError: a checkpoint's tensors contradict its configuration.
        MissingRuntime: a checkpoint needs the plug-in, which is not installed.
        ServerError: a server did not start, or died.
        BenchmarkFailed: too many requests failed.
    """
    load = load or ServedLoad()
    folders = {BASELINE: baseline, **candidates}
    if BASELINE in candidates or not candidates:
        raise ValueError(f"candidates need distinct names, got {list(candidates)}")
    configs = _check(folders, load)
    # Always passed to vLLM: by default it would convert float32 to half precision.
    dtypes = {name: dtype or precision.name_of(config.dtype) for name, config in configs.items()}
    common = [*_common_options(environment, load, len(folders)), *options]
    variables = threads_of(environment)
    with ExitStack() as stack:
        meter, energy = open_meter(on_gpu=not environment.cpu)
        bench = stack.enter_context(start_bench(environment, baseline, load, meter))
        sides = []
        for name, folder in folders.items():
            server = serving(
                environment,
                folder,
                name=name,
                options=[*_needs(folder, configs[name]), *common],
                env=variables,
                dtype=dtypes[name],
                startup_timeout_s=startup_timeout_s,
            )
            sides.append(side_of(name, folder, stack.enter_context(server), on_gpu=not environment.cpu))
        description = {
            "vllm": environment.version,
            "plugin": environment.plugin,
            "device": "cpu" if environment.cpu else "cuda",
            "energy": energy,
            "dtype": dtypes,
            "options": common,
            "env": variables,
        }
        return _measure(bench, sides, description)


def pool(looks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Like `numprune.serving.benchmark.run.pool`, for the results of `run_served` for one candidate."""
    last = looks[-1]
    fields = last["speed"]["load"]
    load = ServedLoad(**{**fields, "concurrency": tuple(fields["concurrency"])})
    sides = (BASELINE, "candidate")

    def read(look: Mapping[str, Any], level: int) -> Look[Requests]:
        found = (look["samples"][side]["repeats"][str(level)] for side in sides)
        return Look(*([Requests.from_json(repeat) for repeat in repeats] for repeats in found))

    levels = {level: [read(look, level) for look in looks] for level in load.concurrency}
    speed = speed_section(load, levels, last["speed"]["runtime"])
    return {**last, "speed": {**speed, "dtype": last["speed"]["dtype"]}}


def _check(folders: Mapping[str, Path], load: ServedLoad) -> dict[str, Any]:
    """The configuration of each checkpoint. Raises as `run_served`."""
    configs: dict[str, Any] = {}
    for name, folder in folders.items():
        if not folder.is_dir():
            raise InputError(f"{name} {str(folder)!r} is not a folder; give a checkpoint")
        audit(folder)  # vLLM would truncate tensors larger than the configuration says
        configs[name] = read_config(folder)
        context = configs[name].max_position_embeddings
        if load.positions > context:
            raise InputError(
                f"load.prompt_length = {load.prompt_length} and load.output_length = {load.output_length} need "
                f"{load.positions} positions, but {folder / 'config.json'} has max_position_embeddings = {context}"
            )
        if configs[name].vocab_size != configs[BASELINE].vocab_size:
            raise InputError(
                f"the vocabulary of the baseline has {configs[BASELINE].vocab_size} tokens, that of {name} "
                f"{configs[name].vocab_size}: they cannot run the same prompts"
            )
    return configs


def _needs(folder: Path, config: Any) -> list[str]:
    """Options that vLLM needs to load it; with a manifest the server finds them itself."""
    if (folder / manifest.FILE_NAME).is_file():
        return []
    needs = vllm.preflight(config)["needs"]
    assert isinstance(needs, list)
    return [str(option) for option in needs]


def _common_options(environment: Environment, load: ServedLoad, servers: int) -> list[str]:
    return [
        *("--max-model-len", str(load.positions)),
        *("--kv-cache-memory-bytes", str(load.kv_cache_bytes)),
        "--no-enable-prefix-caching",
        # vLLM checks GPU memory against this share, although the KV cache size is fixed above.
        *(["--enforce-eager"] if environment.cpu else ["--gpu-memory-utilization", f"{_GPU_SHARE / servers:.3f}"]),
    ]


def threads_of(environment: Environment) -> dict[str, str]:
    """Environment variables for vLLM on few CPUs. User settings take precedence.

    With its worker bound to one of two CPUs, vLLM's engine spun on the other for the whole request, which left no CPU
    to send or time the tokens.
    """
    cpus = processors.count()
    if not environment.cpu or cpus > _FEW_CPUS:
        return {}
    threads = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(max(1, cpus - 1))}
    return {name: os.environ.get(name, value) for name, value in threads.items()}


def _measure(bench: Bench, sides: Sequence[Side], description: Mapping[str, Any]) -> dict[str, Any]:
    load = bench.load
    machine = {
        "uses_gpu": description["device"] != "cpu",
        "own_processes": [bench.worker.pid, *itertools.chain.from_iterable(side.processes for side in sides)],
    }
    failed: list[str] = []
    total = len(sides) * len(load.concurrency) * (load.warmup + load.repeats)
    before, stolen = capture(**machine), StolenTime()
    with Progress(total, "benchmark (vllm)", "run", leave=True) as bar:
        for concurrency in load.concurrency:
            for index in range(load.warmup + load.repeats):
                # A B, then B A; counting restarts with the first repeat.
                warm, turn = index >= load.warmup, (index if index < load.warmup else index - load.warmup)
                for side in sides if turn % 2 == 0 else sides[::-1]:
                    found = run_once(bench, side, sides, concurrency, failed)
                    (side.repeats if warm else side.warmup).setdefault(concurrency, []).append(found)
                    bar.update()
    stolen_share, after = stolen.share(), capture(**machine)
    first, *others = sides
    footprint = first.footprint(load)
    return {
        side.name: {
            "speed": {
                **speed_section(
                    load,
                    {level: [Look(first.repeats[level], side.repeats[level])] for level in load.concurrency},
                    description,
                ),
                "dtype": {BASELINE: description["dtype"][BASELINE], "candidate": description["dtype"][side.name]},
            },
            "memory": memory_section(footprint, side.footprint(load)),
            **_circumstances(first, side, combine(before, after), stolen_share),
        }
        for side in others
    }


def run_once(bench: Bench, side: Side, sides: Sequence[Side], concurrency: int, failed: list[str]) -> Requests:
    """Run one side while the others are suspended.

    Args:
        failed: failed requests of earlier runs, one line each; this run's are appended.

    Raises BenchmarkFailed, and what `Bench.run` does.
    """
    with standing_still(pid for other in sides if other is not side for pid in other.processes):
        found = bench.run(side, concurrency)
    failed += [f"{side.name}: {error}" for error in found.errors]
    if len(failed) > bench.load.maximum_failed:
        raise BenchmarkFailed(
            f"{counted(len(failed), 'request')} failed (limit {bench.load.maximum_failed}), the last "
            f"{len(found.errors)} of {bench.load.requests(concurrency)} at concurrency {concurrency}; {failed[-1]}"
        )
    return found


def _circumstances(baseline: Side, candidate: Side, machine: Machine, stolen_share: float) -> dict[str, Any]:
    contention = Contention(baseline.waited_share(), candidate.waited_share(), stolen_share)
    packed = {
        name: packed_share(itertools.chain.from_iterable(side.repeats.values()))
        for name, side in ((BASELINE, baseline), ("candidate", candidate))
    }
    late = [
        f"{share:.0%} of the {name}'s tokens arrived together with the previous one (limit {_PACKED_SHARE:.0%}): "
        "the client got too little CPU time; stop other programs"
        for name, share in packed.items()
        if share > _PACKED_SHARE
    ]
    reasons = (*machine.reasons, *contention.reasons, *late)
    machine = machine.model_copy(update={"valid": not reasons, "reasons": reasons})
    return {
        "environment": machine.model_dump(mode="json"),
        "samples": {
            "contention": {**contention.describe(), "packed_share": packed},
            **{
                name: {
                    kind: {str(level): [repeat.to_json() for repeat in repeats] for level, repeats in found.items()}
                    for kind, found in (("warmup", side.warmup), ("repeats", side.repeats))
                }
                for name, side in ((BASELINE, baseline), ("candidate", candidate))
            },
        },
    }
