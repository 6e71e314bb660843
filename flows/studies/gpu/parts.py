"""The parts of the run. Each yields rows of plain JSON one by one, so an interruption loses only the rest."""

import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any

import torch

from numprune.flows.studies.gpu.checks import CHECKS
from numprune.flows.studies.gpu.generation import Generation, captured, random_llama
from numprune.flows.studies.gpu.sizes import BATCHES, Sizes, Width, widths
from numprune.flows.studies.speed.clock import now, seconds
from numprune.flows.studies.speed.layer import PARTS as WORKS
from numprune.flows.studies.speed.layer import measure_layer
from numprune.serving.energy import EnergyMeter, open_meter, start_counting

_ENERGY_S = 1.0  # because the counter is updated only every tenths of a second

Row = dict[str, Any]
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Part:
    """`limit`: seconds after which it is stopped, including the start of its process."""

    limit: int
    rows: Callable[[torch.device, Sizes, Progress], Iterator[Row]]


def run_checks(device: torch.device, sizes: Sizes, progress: Progress) -> Iterator[Row]:
    """Yield one row for each check: its problem, why it was skipped, or neither."""
    for name, check in CHECKS.items():
        progress(name)
        problem, skipped, start = None, None, now(device)
        try:
            skipped = check(device)
        except Exception as error:  # the other checks must still run
            traceback.print_exc()
            problem = f"{type(error).__name__}: {error}"
        yield {"check": name, "problem": problem, "skipped": skipped, "seconds": now(device) - start}


def measure_rates(device: torch.device, sizes: Sizes, progress: Progress) -> Iterator[Row]:
    """Yield the rates of square matrix products, in FLOP/s, and of a copy in memory, in bytes read or written per
    second.

    Pruning computes in float32 and must not use TF32; the generating model is in bfloat16.
    """
    n = sizes.matrix
    kinds = {
        "float32": (torch.float32, "highest"),
        "TF32": (torch.float32, "high"),
        "float64": (torch.float64, "highest"),
        "bfloat16": (torch.bfloat16, "highest"),
    }
    for name, (dtype, precision) in kinds.items():
        if name == "TF32" and device.type != "cuda":
            continue
        progress(f"{n} x {n} matrices in {name}")
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        torch.set_float32_matmul_precision(precision)
        took = _median_seconds(partial(torch.mm, a, b), device, sizes.repeats)
        torch.set_float32_matmul_precision("highest")
        yield {"rate": name, "flop_per_s": 2 * n**3 / took}
    source = torch.ones(sizes.copied_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    took = _median_seconds(partial(target.copy_, source), device, sizes.repeats)
    yield {"rate": "memory", "bytes_per_s": 2 * sizes.copied_bytes / took}


def measure_pruning(device: torch.device, sizes: Sizes, progress: Progress) -> Iterator[Row]:
    """Yield the times of pruning one layer, for each number of measured tokens."""
    layer = sizes.layer
    group = 2 * (layer.heads // layer.kv_heads + 1) * layer.hidden * sizes.head_dim
    parameters = layer.kv_heads * group + 3 * layer.hidden * layer.intermediate
    for measured in sizes.measured_tokens:
        _reset_peak(device)
        times = measure_layer(layer, sizes.tokens, measured, sizes.sequence_length, sizes.repeats, device, progress)
        yield {
            **asdict(times),
            "whole": {work: times.whole(work) for work in WORKS},
            "forward_flop_per_s": 2 * parameters * sizes.tokens / times.parts["forward"],  # without attention scores
            "peak_memory_bytes": _peak(device),
        }


def measure_generation(device: torch.device, sizes: Sizes, progress: Progress) -> Iterator[Row]:
    """Yield prefill and decoding of every width at every batch size, in bfloat16; the dense one also at the end.

    The difference between the two dense measurements shows how much others can differ because of the device alone.
    """
    dense, *narrower = widths(sizes)
    meter, energy = open_meter(on_gpu=device.type == "cuda")
    progress(f"energy: {energy}")
    for width in (dense, *narrower, Width("dense again", dense.kv_heads, dense.intermediate, dense.removed)):
        progress(f"{width.name}: {width.kv_heads} KV heads, {width.intermediate} channels")
        model = random_llama(sizes, width, device, torch.bfloat16)
        for batch in BATCHES:
            _reset_peak(device)
            generation = Generation(model, _prompts(sizes, batch, device), sizes.new)
            prefill, decode = _times(generation, sizes, device)
            yield {
                "width": width.name,
                "kv_heads": width.kv_heads,
                "intermediate": width.intermediate,
                "removed": width.removed,
                "weight_bytes": sum(parameter.nbytes for parameter in model.parameters()),
                "batch": batch,
                "prefill_seconds": prefill,
                "decode_seconds": decode,
                "decode_joules_per_token": _joules(generation, sizes, device, meter, batch),
                "peak_memory_bytes": _peak(device),
            }
        del model


def _prompts(sizes: Sizes, batch: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, sizes.vocabulary, (batch, sizes.prompt), generator=generator).to(device)


def _times(generation: Generation, sizes: Sizes, device: torch.device) -> tuple[float, float]:
    """Return the seconds of one prefill and of one decoding step."""
    prefill = _median_seconds(captured(generation.prefill, device), device, sizes.repeats)
    step = captured(generation.step, device)

    def steps() -> None:
        for _ in range(sizes.new):
            step()

    times = []
    for _ in range(sizes.repeats):
        generation.restart()
        times.append(seconds(steps, device) / sizes.new)
    return prefill, median(times)


def _joules(
    generation: Generation, sizes: Sizes, device: torch.device, meter: EnergyMeter | None, batch: int
) -> float | None:
    """Return the energy per decoded token, over at least a second; None if it is not measured."""
    if meter is None:
        return None
    step = captured(generation.step, device)
    start, joules, steps = now(device), start_counting(meter), 0
    while now(device) - start < _ENERGY_S:
        generation.restart()
        for _ in range(sizes.new):
            step()
        steps += sizes.new
    taken = joules()
    return None if taken is None else taken / (steps * batch)


def _median_seconds(work: Callable[[], Any], device: torch.device, repeats: int) -> float:
    work()
    return median(seconds(work, device) for _ in range(repeats))


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> int | None:
    """Peak bytes allocated by torch on a GPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


# The sum of all limits is under eight minutes.
PARTS = {
    "checks": Part(100, run_checks),
    "rates": Part(45, measure_rates),
    "pruning": Part(150, measure_pruning),
    "generation": Part(180, measure_generation),
}
