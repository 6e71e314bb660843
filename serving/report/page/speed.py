"""Sections: speed of baseline and candidate, in process and on servers."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from numprune.counted import counted
from numprune.serving.report import names, precision, ratios, words
from numprune.serving.report.models import Percentiles, Report, RuntimeSpeed
from numprune.serving.report.page import charts, facts
from numprune.serving.report.page.blocks import Block, Cell, Chart, Folded, Heading, Pair, Section, Table, Text
from numprune.serving.report.page.charts import Interval, Samples
from numprune.serving.report.page.memory import served_rows

_MAXIMUM_RUNTIMES = 8
_MAXIMUM_REPEATS = 200  # in a table
_MAXIMUM_SHAPES = 32

_SHORT = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2e": "End to end", "latency": "Latency"}
_NAMES = (*words.RATES, *words.LATENCIES, *words.ENERGY)


def section(report: Report) -> Section:
    blocks: list[Block] = []
    local = {name: found for name, found in report.speed.items() if not is_served(name, found)}
    for name, found in islice(local.items(), _MAXIMUM_RUNTIMES):
        blocks.append(Heading(name))
        said = precision.computed(report, name)
        if found.shapes:
            blocks += _by_shape(report, name, found, said)
        else:
            blocks += _measured(f"speed-{name}", name, found, said, ratios.cost(report, found))
    if len(local) > _MAXIMUM_RUNTIMES:
        blocks.append(Text(f"{len(local) - _MAXIMUM_RUNTIMES} more runtimes are in report.json.", "absent"))
    return Section("speed", "Speed", blocks or [Text("Not measured in this run.", "absent")])


def served(report: Report) -> Section | None:
    """None if no server was measured."""
    blocks: list[Block] = []
    servers = {name: found for name, found in report.speed.items() if is_served(name, found)}
    for name, found in islice(servers.items(), _MAXIMUM_RUNTIMES):
        blocks.append(Heading(name))
        if name in report.memory:
            rows = list(served_rows(report.memory[name]))
            blocks.append(Table(f"Memory of a server, {name}", ("", "Baseline", "Candidate", "Ratio"), rows))
        levels = found.concurrency or {"": found}
        for level, measured in islice(levels.items(), _MAXIMUM_RUNTIMES):
            at = f", {level} at a time" if level else ""
            if level:
                blocks.append(Heading(f"{name}, {counted(int(level), 'request')} at a time"))
            said, cost = precision.computed(report, name), ratios.cost(report, measured)
            blocks += _measured(f"speed-{name}-{level or 'all'}", f"{name}{at}", measured, said, cost)
    return Section("served", "Behind a server", blocks) if blocks else None


def _by_shape(report: Report, name: str, found: RuntimeSpeed, said: str) -> Iterator[Block]:
    """An encoder: all shapes in one table, with details on demand."""
    shapes, images = dict(islice(found.shapes.items(), _MAXIMUM_SHAPES)), names.of_images(report)
    rows: list[list[Cell | str]] = []
    for shape, measured in shapes.items():
        before, after = measured.baseline.latency_ms, measured.candidate.latency_ms
        sides = [_percentiles(side) for side in (before, after)]
        rows.append(
            [names.shape(shape, images=images), *sides, _ratio("latency", measured), _ratio("samples_per_s", measured)]
        )
    header = ("Batch", "Baseline, ms", "Candidate, ms", "Latency ratio", "Throughput ratio")
    by = "images in a batch" if images else "texts in a batch and tokens of each"
    yield Table(f"A forward pass, {name}: median latency by {by}", header, rows)
    if len(found.shapes) > _MAXIMUM_SHAPES:
        yield Text(f"{len(found.shapes) - _MAXIMUM_SHAPES} more shapes are in report.json.", "absent")
    for shape, measured in shapes.items():
        title = f"{name}, {names.shape(shape, images=images)}"
        cost = ratios.cost(report, measured, shape)
        yield Folded(title, list(_measured(f"speed-{name}-{shape}", title, measured, said, cost)))


def is_served(name: str, found: RuntimeSpeed) -> bool:
    return name == "vllm" or bool(found.concurrency)


def _measured(key: str, name: str, found: RuntimeSpeed, said: str, cost: ratios.Cost | None) -> Iterator[Block]:
    """`said`: the sentence on precision."""
    failed = f"{counted(found.failed_requests, 'request')} failed" if found.failed_requests else "no request failed"
    order = found.order[:8] + ("…" if len(found.order) > 8 else "")
    yield Text(
        f"{counted(found.repeats, 'repeat')} of each side after {found.warmup} of warm-up, in turns ({order}); "
        f"{failed}. {said}".rstrip(),
        "fail" if found.failed_requests else "",
    )
    table = Table(f"Speed, {name}", ("", "Baseline", "Candidate", "Ratio"), list(_rows(found, cost)))
    metrics = [
        metric for metric in _NAMES if metric in found.baseline.by_repeat and metric in found.candidate.by_repeat
    ]
    drawn = [chart for chart in (_strips(key, name, found, metrics), _ratios(key, name, found)) if chart]
    repeats = [Folded(f"Every repeat, {name}", [_repeats(name, found, metrics)])] if metrics else []
    if len(drawn) == 2:
        yield Pair(drawn[:1], [drawn[1], table])
    elif drawn:
        yield Pair(drawn, [table])
    else:
        yield table
    yield from repeats
    yield Folded(f"Load and runtime, {name}", [facts.block(found.load), *_runtime(name, found.runtime)])


def _runtime(name: str, described: Mapping[str, Any]) -> Iterator[Block]:
    """Side by side if each side has its own description."""
    baseline, candidate = described.get("baseline"), described.get("candidate")
    if isinstance(baseline, Mapping) and isinstance(candidate, Mapping):
        yield facts.sides(f"Runtime, {name}", baseline, candidate)
    elif described:
        yield facts.block(described)


def _rows(found: RuntimeSpeed, cost: ratios.Cost | None) -> Iterator[list[Cell | str]]:
    one, other = found.baseline, found.candidate
    for name, label in words.RATES.items():
        slow, fast = getattr(one, name), getattr(other, name)
        if slow is not None or fast is not None:
            unit = words.RATE_UNITS.get(name, "tokens/s")
            yield [Cell(label, unit), words.number(slow, 4), words.number(fast, 4), _ratio(name, found)]
    for name, label in words.LATENCIES.items():
        before, after = getattr(one, f"{name}_ms"), getattr(other, f"{name}_ms")
        if before is not None or after is not None:
            yield [Cell(label, "ms, median"), _percentiles(before), _percentiles(after), _ratio(name, found)]
    for name, label in words.ENERGY.items():
        if (used := getattr(one, name)) is not None:
            yield [
                Cell(label, "J per output token"),
                words.number(used),
                words.number(getattr(other, name)),
                _ratio(name, found),
            ]
    if cost is not None:
        yield [Cell("Cost", f"per million {cost.tokens}"), *(words.number(side, 3) for side in cost[1:]), ""]


def _ratio(name: str, found: RuntimeSpeed) -> Cell:
    ratio = getattr(found, name)
    if ratio is None:
        return Cell(words.ABSENT)
    floor, told = ratios.floor(name, found), ratios.reading(name, found)
    noise = "" if floor is None or told == ratios.TOO_NOISY else f"noise ±{words.NARROW}{words.share(floor)}"
    said = ", ".join(part for part in (told, noise) if part)
    return Cell(words.times(ratio.ratio.value), f"{words.interval(ratio.ratio)}\n{said}".strip())


def _percentiles(found: Percentiles | None) -> Cell:
    if found is None:
        return Cell(words.ABSENT)
    others = {"p90": found.p90, "p95": found.p95, "p99": found.p99}
    known = [f"{name}{words.WIDE}{words.number(value, 3)}" for name, value in others.items() if value is not None]
    return Cell(words.number(found.p50, 3), "\n".join(known))


def _ratios(key: str, name: str, found: RuntimeSpeed) -> Chart | None:
    rows, told = [], []
    for metric in _NAMES:
        if (ratio := getattr(found, metric)) is not None:
            low, high = ratio.ratio.interval95
            rows.append(Interval(_short(metric), ratio.ratio.value, low, high, ratios.floor(metric, found)))
            told.append(f"{words.named(metric)} {words.times(ratio.ratio.value)} ({words.interval(ratio.ratio)})")
    drawn = charts.intervals(
        f"{key}-ratios",
        f"Candidate over baseline, {name}, with 95 % intervals: {'; '.join(told)}.",
        rows,
        axis="candidate / baseline",
        reference=1.0,
    )
    caption = "Ratios with 95 % intervals; grey: the noise floor. Rates are better above 1, "
    return Chart(drawn, f"{caption}latencies and energy below.") if drawn else None


def _strips(key: str, name: str, found: RuntimeSpeed, metrics: Sequence[str]) -> Chart | None:
    one, other = found.baseline.by_repeat, found.candidate.by_repeat
    drawn = charts.strips(
        f"{key}-repeats",
        f"Every repeat, {name}: baseline and candidate on one axis per metric. The table of repeats has the figures.",
        [Samples(_titled(metric), one[metric], other[metric]) for metric in metrics],
    )
    caption = "A mark for each repeat (circles: baseline, diamonds: candidate); bars: medians."
    return Chart(drawn, caption) if drawn else None


def _repeats(name: str, found: RuntimeSpeed, metrics: Sequence[str]) -> Table:
    one, other = found.baseline.by_repeat, found.candidate.by_repeat
    rows: list[list[Cell | str]] = [
        [
            str(repeat + 1),
            *(Cell(words.number(one[metric][repeat]), words.number(other[metric][repeat])) for metric in metrics),
        ]
        for repeat in range(min(found.repeats, _MAXIMUM_REPEATS))
    ]
    header = ("Repeat", *(_titled(metric) for metric in metrics))
    return Table(f"Every repeat, {name}: baseline, with the candidate below", header, rows)


def _short(metric: str) -> str:
    return (words.RATES | words.ENERGY).get(metric) or _SHORT[metric]


def _titled(metric: str) -> str:
    unit = "ms" if metric in words.LATENCIES else words.RATE_UNITS.get(metric, "tokens/s")
    return f"{_short(metric)}, {unit}"
