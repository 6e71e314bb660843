"""Speed and memory of baseline and candidate in one runtime."""

from typing import Self

from pydantic import Field, model_validator

from numprune.serving.report.models.fields import (
    Concurrency,
    Count,
    Facts,
    Metric,
    Model,
    Number,
    ReportedEstimate,
    Shape,
)
from numprune.serving.report.models.run import Dtypes, SizePair


class Percentiles(Model):
    """None for percentiles without enough samples."""

    p50: Number = None
    p90: Number = None
    p95: Number = None
    p99: Number = None
    samples: Count


class SpeedSide(Model):
    """Figures that a runtime does not have are None.

    TPOT, output tokens over the whole duration and good requests are for servers; `latency_ms` (of one forward pass)
    and `samples_per_s` are the only figures of encoders. `joules_per_token` is the energy of the GPU, including
    prefill, per output token.

    `by_repeat` has the value of each repeat by ratio name (latencies in ms), None for repeats with a failed request.
    """

    ttft_ms: Percentiles | None = None
    tpot_ms: Percentiles | None = None
    itl_ms: Percentiles | None = None
    e2e_ms: Percentiles | None = None
    decode_tokens_per_s: Number = None
    prefill_tokens_per_s: Number = None
    output_tokens_per_s: Number = None
    goodput_requests_per_s: Number = None
    joules_per_token: Number = None
    latency_ms: Percentiles | None = None
    samples_per_s: Number = None
    by_repeat: dict[Metric, tuple[Number, ...]] = Field(default={})


class Ratio(Model):
    """Candidate / baseline, repeat by repeat."""

    ratio: ReportedEstimate


class NoiseFloor(Model):
    """The baseline against itself: the half-width around 1 of the ratio's 95 % interval, and its number of samples."""

    relative: Number
    neighbours: Count


class RuntimeSpeed(Model):
    """One runtime; `noise_floor` is keyed by ratio name, and `looks` counts the pooled benchmarks.

    `dtype`: the compute precision. A server is measured at several concurrencies: `concurrency` has all of them, and
    the fields beside it are those of the first. Likewise `shapes` for encoders: batch size x tokens.
    """

    load: Facts
    runtime: Facts = Field(default={})  # provider, threads, versions, device
    dtype: Dtypes | None = None
    looks: Count = 1
    warmup: Count
    repeats: Count  # over all looks
    order: str
    failed_requests: Count
    baseline: SpeedSide
    candidate: SpeedSide
    ttft: Ratio | None = None
    tpot: Ratio | None = None
    itl: Ratio | None = None
    e2e: Ratio | None = None
    decode_tokens_per_s: Ratio | None = None
    prefill_tokens_per_s: Ratio | None = None
    output_tokens_per_s: Ratio | None = None
    goodput_requests_per_s: Ratio | None = None
    joules_per_token: Ratio | None = None
    latency: Ratio | None = None
    samples_per_s: Ratio | None = None
    noise_floor: dict[str, NoiseFloor] = Field(default={})
    concurrency: dict[Concurrency, "RuntimeSpeed"] = Field(default={})
    shapes: dict[Shape, "RuntimeSpeed"] = Field(default={})

    @model_validator(mode="after")
    def _every_repeat(self) -> Self:
        lists = [*self.baseline.by_repeat.values(), *self.candidate.by_repeat.values()]
        if self.repeats and any(len(values) != self.repeats for values in lists):  # as above
            raise ValueError(f"by_repeat must have a value for each of the {self.repeats} repeats")
        return self


class MemorySide(Model):
    """Peaks are device memory on a GPU and resident memory on a CPU; `kv_tokens`: capacity of the KV cache."""

    peak_bytes_load: Number = None
    peak_bytes_run: Number = None
    weight_bytes: Number = None
    kv_bytes_per_token: Number = None
    kv_tokens: Number = None


class RuntimeMemory(Model):
    baseline: MemorySide
    candidate: MemorySide
    peak_bytes: SizePair
    kv_tokens: SizePair | None = None  # in the same memory
