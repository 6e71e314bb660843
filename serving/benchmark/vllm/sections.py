"""Turns requests into sections of the report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from numprune.serving.benchmark.estimators import percentiles
from numprune.serving.benchmark.load import interleaving
from numprune.serving.benchmark.samples import ENERGY
from numprune.serving.benchmark.sections import Look, by_repeat, mean_of, ratios, repeats_of
from numprune.serving.benchmark.vllm.load import ServedLoad
from numprune.serving.benchmark.vllm.metrics import KvCache
from numprune.serving.benchmark.vllm.requests import METRICS, Requests

Section = dict[str, Any]
Levels = Mapping[int, Sequence[Look[Requests]]]  # by concurrency


@dataclass(frozen=True)
class Footprint:
    """Memory of one side. Peaks are resident memory summed over the server's processes; None on a GPU."""

    weight_bytes: int
    kv_cache: KvCache
    kv_cache_bytes: int
    peak_bytes_load: int | None
    peak_bytes_run: int | None


def speed_section(load: ServedLoad, looks: Levels, descriptions: Mapping[str, Any]) -> Section:
    """`speed.vllm`: the figures of the first concurrency, and under `concurrency` those of each.

    `failed_requests` counts all of them, so that no gate passes on only the successful requests.
    """
    levels = {str(level): _level(load, level, looks[level]) for level in load.concurrency}
    first = levels[str(load.concurrency[0])]
    return {
        **first,
        "load": load.describe(),
        "runtime": dict(descriptions),
        "failed_requests": sum(level["failed_requests"] for level in levels.values()),
        "concurrency": levels,
    }


def _level(load: ServedLoad, level: int, looks: Sequence[Look[Requests]]) -> Section:
    baseline, candidate = repeats_of(looks)
    return {
        "load": {"concurrency": level, "requests": load.requests(level)},
        "looks": len(looks),
        "warmup": load.warmup,
        "repeats": len(baseline),
        "order": interleaving(len(baseline)),
        "failed_requests": sum(repeat.failed for repeat in chain(baseline, candidate)),
        "baseline": _side(baseline),
        "candidate": _side(candidate),
        **ratios(looks, (*METRICS, ENERGY)),
    }


def _side(repeats: Sequence[Requests]) -> Section:
    """Percentiles over all successful requests; rates over all repeats together."""
    requests = [request for repeat in repeats for request in repeat.succeeded]
    whole = Requests(
        concurrency=repeats[0].concurrency,
        succeeded=tuple(requests),
        errors=(),
        duration_s=sum(repeat.duration_s for repeat in repeats),
        goodput_requests_per_s=sum(repeat.goodput_requests_per_s * repeat.duration_s for repeat in repeats)
        / sum(repeat.duration_s for repeat in repeats),
        threads=repeats[0].threads,
    ).metrics()
    by_repeats = by_repeat(repeats, (*METRICS, ENERGY))
    rates = ("decode_tokens_per_s", "prefill_tokens_per_s", "output_tokens_per_s", "goodput_requests_per_s")
    return {
        "ttft_ms": percentiles([request.ttft_ms for request in requests]),
        "tpot_ms": percentiles([request.tpot_ms for request in requests]),
        "itl_ms": percentiles([step for request in requests for step in request.itl_ms]),
        "e2e_ms": percentiles([request.e2e_ms for request in requests]),
        **{name: whole[name] for name in rates},
        ENERGY: mean_of(by_repeats.get(ENERGY, [])),
        "by_repeat": by_repeats,
    }


def memory_section(baseline: Footprint, candidate: Footprint) -> Section:
    """`memory.vllm`. KV-cache bytes per token are as served: memory divided by the tokens that fit."""
    before, after = _peak(baseline), _peak(candidate)
    return {
        "baseline": _memory(baseline),
        "candidate": _memory(candidate),
        "peak_bytes": {"baseline": before, "candidate": after},
        "kv_tokens": {"baseline": baseline.kv_cache.tokens, "candidate": candidate.kv_cache.tokens},
    }


def _memory(side: Footprint) -> Section:
    return {
        "peak_bytes_load": side.peak_bytes_load,
        "peak_bytes_run": side.peak_bytes_run,
        "weight_bytes": side.weight_bytes,
        "kv_bytes_per_token": side.kv_cache_bytes / side.kv_cache.tokens,
        "kv_tokens": side.kv_cache.tokens,
    }


def _peak(side: Footprint) -> int | None:
    return None if side.peak_bytes_run is None else max(side.peak_bytes_load or 0, side.peak_bytes_run)
