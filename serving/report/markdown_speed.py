"""The sections of the report in Markdown on speed and memory."""

from collections.abc import Iterable

from numprune.counted import counted
from numprune.serving.report import names, precision, ratios
from numprune.serving.report.markdown_cells import ABSENT, amount, cell, estimate, figure, table
from numprune.serving.report.models import Percentiles, Ratio, Report, RuntimeSpeed


def speed_sections(report: Report) -> list[str]:
    lines, images = [], names.of_images(report)
    for runtime, speed in report.speed.items():
        levels = [(f"{runtime}, {level} at a time", found, "") for level, found in speed.concurrency.items()]
        levels += [
            (f"{runtime}, {names.shape(shape, images=images)}", found, shape) for shape, found in speed.shapes.items()
        ]
        for name, found, shape in levels or [(runtime, speed, "")]:
            lines += [
                f"## Speed, {name}",
                "",
                f"{counted(found.repeats, 'repeat')} after {found.warmup} of warm-up, in the order "
                f"{cell(found.order)}; {counted(found.failed_requests, 'failed request')}. Ratios are candidate / "
                f"baseline with a two-sided 95 % interval. {cell(precision.computed(report, runtime))}".rstrip(),
                "",
                *table(
                    ["", "baseline", "candidate", "ratio", "noise floor"],
                    _speed_rows(found, ratios.cost(report, found, shape)),
                ),
            ]
    return lines


_LATENCIES = {
    "ttft": "TTFT, ms",
    "tpot": "TPOT, ms",
    "itl": "ITL, ms",
    "e2e": "end to end, ms",
    "latency": "latency of a batch, ms",
}
_RATES = {
    "decode_tokens_per_s": "decode, tokens/s",
    "prefill_tokens_per_s": "prefill, tokens/s",
    "output_tokens_per_s": "output, tokens/s",
    "goodput_requests_per_s": "goodput, requests/s",
    "samples_per_s": "throughput, samples/s",
}


def _speed_rows(speed: RuntimeSpeed, cost: ratios.Cost | None) -> Iterable[list[str]]:
    one, other = speed.baseline, speed.candidate
    for key, name in _LATENCIES.items():
        before, after = getattr(one, f"{key}_ms"), getattr(other, f"{key}_ms")
        if before is not None or after is not None:
            yield [name, _percentiles(before), _percentiles(after), *_ratio(speed, key, getattr(speed, key))]
    for key, name in _RATES.items():
        slow, fast = getattr(one, key), getattr(other, key)
        if slow is not None or fast is not None:
            yield [name, figure(slow), figure(fast), *_ratio(speed, key, getattr(speed, key))]
    if one.joules_per_token is not None:
        used = [figure(one.joules_per_token), figure(other.joules_per_token)]
        yield ["energy, J per output token", *used, *_ratio(speed, "joules_per_token", speed.joules_per_token)]
    if cost is not None:
        yield [f"cost per million {cost.tokens}", figure(cost.baseline), figure(cost.candidate), "", ""]


def _ratio(speed: RuntimeSpeed, key: str, ratio: Ratio | None) -> list[str]:
    floor, told = ratios.floor(key, speed), ratios.reading(key, speed)
    return [
        ABSENT if ratio is None else ": ".join(part for part in (estimate(ratio.ratio), told) if part),
        ABSENT if floor is None else f"± {figure(floor)}",
    ]


def _percentiles(found: Percentiles | None) -> str:
    if found is None:
        return ABSENT
    named = {"p50": found.p50, "p90": found.p90, "p95": found.p95, "p99": found.p99}
    return ", ".join(f"{name} {figure(value)}" for name, value in named.items() if value is not None) or ABSENT


def memory_sections(report: Report) -> list[str]:
    lines = []
    for runtime, memory in report.memory.items():
        one, other = memory.baseline, memory.candidate
        rows = [
            ["weights", amount(one.weight_bytes), amount(other.weight_bytes)],
            *(
                [["KV cache per token", amount(one.kv_bytes_per_token), amount(other.kv_bytes_per_token)]]
                if (one.kv_bytes_per_token, other.kv_bytes_per_token) != (None, None)
                else []
            ),
            ["peak of the load", amount(one.peak_bytes_load), amount(other.peak_bytes_load)],
            ["peak of the run", amount(one.peak_bytes_run), amount(other.peak_bytes_run)],
        ]
        if memory.kv_tokens is not None:
            rows.append(["tokens in the KV cache", amount(one.kv_tokens), amount(other.kv_tokens)])
        lines += [f"## Memory, {runtime} (bytes)", "", *table(["", "baseline", "candidate"], rows)]
    return lines
