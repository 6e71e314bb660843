"""The measuring loop: every model on a server of its own, all started, one of them running at a time."""

import itertools
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

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
_PACKED_SHARE = 0.25  # a server that is asked for much sends some tokens in pairs; more, and TPOT is the client's
_FEW_CPUS = 3
_GPU_SHARE = 0.9  # of the GPU's memory, for all servers together


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
    """Measure them all, interleaved A B B A … (with two candidates A B C C B A …), at each concurrency by itself.

    Servers keep no prompts from one repeat to the next (no prefix caching), and each has the same memory for its KV
    cache. On CPUs they run eagerly: compiling takes minutes, and all sides go without.

    Args:
        candidates: by name, checkpoints that vLLM loads; not empty.
        baseline: a checkpoint with the same vocabulary.
        environment: that has vLLM.
        dtype: that all sides compute in; None: each in that of its stored weights.
        options: of vLLM, for every server.
        startup_timeout_s: a server may take so long to become ready.

    Returns:
        By candidate, what `run_benchmark` gives of other runtimes: `speed`, `memory`, `environment`, `samples`.

    Raises:
        InputError: a folder that vLLM cannot serve, or that the load or the baseline does not fit.
        IntegrityError: a checkpoint's tensors are not what its configuration says.
        MissingRuntime: a checkpoint needs the plug-in, and it is not there.
        ServerError: a server did not start, or died.
        BenchmarkFailed: too many requests failed.
    """
    load = load or ServedLoad()
    folders = {BASELINE: baseline, **candidates}
    if BASELINE in candidates or not candidates:
        raise ValueError(f"candidates need names of their own, got {list(candidates)}")
    configs = _check(folders, load)
    # Said to vLLM in any case: left to itself, it would halve float32.
    dtypes = {name: dtype or precision.name_of(config.dtype) for name, config in configs.items()}
    common = [*_common_options(environment, load, len(folders)), *options]
    variables = _threads(environment)
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
    """As `numprune.serving.benchmark.run.pool`, of what `run_served` gave of one candidate."""
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
        audit(folder)  # vLLM would cut what is larger than the configuration says
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
                f"{configs[name].vocab_size}: the same prompts do not fit both"
            )
    return configs


def _needs(folder: Path, config: Any) -> list[str]:
    """Options without which vLLM does not load it; the server finds them itself where there is a manifest."""
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
        # A GPU's memory is checked against this share, although what it is used for is fixed above.
        *(["--enforce-eager"] if environment.cpu else ["--gpu-memory-utilization", f"{_GPU_SHARE / servers:.3f}"]),
    ]


def _threads(environment: Environment) -> dict[str, str]:
    """How a server uses few CPUs. What the user has set stays.

    With its worker bound to one of two CPUs, vLLM's engine was seen to spin on the other for as long as a request took:
    nobody was left to send the tokens, or to time them.
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
                # A B, then B A; the count begins again with the first repeat.
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
    """Run one side while the others stand still.

    Args:
        failed: of earlier runs, a line for each request; this run's are added.

    Raises BenchmarkFailed, and what `Bench.run` does.
    """
    with standing_still(pid for other in sides if other is not side for pid in other.processes):
        found = bench.run(side, concurrency)
    failed += [f"{side.name}: {error}" for error in found.errors]
    if len(failed) > bench.load.maximum_failed:
        raise BenchmarkFailed(
            f"{len(failed)} requests failed (limit {bench.load.maximum_failed}), the last {len(found.errors)} of "
            f"{bench.load.requests(concurrency)} at concurrency {concurrency}; {failed[-1]}"
        )
    return found


def _circumstances(baseline: Side, candidate: Side, machine: Machine, stolen_share: float) -> dict[str, Any]:
    contention = Contention(baseline.waited_share(), candidate.waited_share(), stolen_share)
    packed = {
        name: packed_share(itertools.chain.from_iterable(side.repeats.values()))
        for name, side in ((BASELINE, baseline), ("candidate", candidate))
    }
    late = [
        f"{share:.0%} of the {name}'s tokens came together with the one before (limit {_PACKED_SHARE:.0%}): whoever "
        "timed them got no CPU meanwhile; end other programs"
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
