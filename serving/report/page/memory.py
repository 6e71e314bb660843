"""Section: sizes and runtime memory."""

from collections.abc import Callable, Iterator
from itertools import islice

from numprune.serving.report import precision, words
from numprune.serving.report.models import Report, RuntimeMemory, SizePair
from numprune.serving.report.page import charts
from numprune.serving.report.page.blocks import Block, Cell, Chart, Folded, Pair, Section, Table, Text

_SIZES: tuple[tuple[str, str, Callable[[float | None], str]], ...] = (
    ("parameters", "Parameters", words.number),
    ("weight_bytes", "Weights", words.size),
    ("kv_bytes_per_token", "KV cache per token", words.size),
    ("flops_per_token", "FLOPs per token", words.number),
)
_MAXIMUM_RUNTIMES = 16


def section(report: Report) -> Section:
    rows: list[list[Cell | str]] = []
    dtype = report.sizes.dtype if report.sizes else None
    bars: list[tuple[str, float | None]] = []
    for key, label, show in _SIZES:
        pair = getattr(report.sizes, key) if report.sizes else None
        if pair is not None:
            stored = f"stored in {precision.named(dtype)}" if key == "weight_bytes" and dtype else ""
            rows.append([Cell(label, stored), show(pair.baseline), show(pair.candidate), _ratio(pair)])
            bars.append((label, pair.ratio))
    shown = dict(islice(report.memory.items(), _MAXIMUM_RUNTIMES))
    for runtime, found in shown.items():
        rows.append(_peak(f"Peak, {runtime}", found))
        bars.append((f"Peak, {runtime}", found.peak_bytes.ratio))
    if not rows:
        return Section("memory", "Memory and size", [Text("Not measured in this run.", "absent")])
    told = "; ".join(f"{label} {words.share(ratio)}" for label, ratio in bars)
    drawn = charts.shares("memory-shares", f"The candidate as a share of the baseline: {told}.", bars)
    table = Table("Memory and size", ("", "Baseline", "Candidate", "Ratio"), rows)
    peaks = "Peaks are of the whole process: device memory on a GPU, resident memory on a CPU."
    blocks: list[Block] = [Text(peaks)] if report.memory else []
    blocks += [Text(said) for runtime in shown if (said := precision.computed(report, runtime))]
    phases = [row for runtime, found in shown.items() for row in _phases(runtime, found)]
    right: list[Block] = [table]
    if phases:
        apart = Table("Peaks of load and run", ("", "Baseline", "Candidate", "Ratio"), phases)
        right.append(Folded("Peaks of load and run", [apart]))
    chart = [Chart(drawn, "Filled: the candidate. Outlined: the baseline.")] if drawn else []
    return Section("memory", "Memory and size", [*blocks, *([Pair(chart, right)] if chart else right)])


def served_rows(found: RuntimeMemory) -> Iterator[list[Cell | str]]:
    """Figures for sizing a server."""
    one, other = found.baseline, found.candidate
    if found.kv_tokens is not None:
        pair = found.kv_tokens
        label = Cell("Tokens in the KV cache", "in the same memory")
        yield [label, words.number(pair.baseline), words.number(pair.candidate), _ratio(pair)]
    for key, name in (("weight_bytes", "Weights"), ("kv_bytes_per_token", "KV cache per token, as served")):
        before, after = getattr(one, key), getattr(other, key)
        if before is not None or after is not None:
            yield [name, words.size(before), words.size(after), _ratio(SizePair(baseline=before, candidate=after))]
    yield _peak("Peak", found)


def _peak(label: str, found: RuntimeMemory) -> list[Cell | str]:
    pair = found.peak_bytes
    return [label, words.size(pair.baseline), words.size(pair.candidate), _ratio(pair)]


def _phases(label: str, found: RuntimeMemory) -> Iterator[list[Cell | str]]:
    for phase in ("load", "run"):
        pair = SizePair(
            **{side: getattr(getattr(found, side), f"peak_bytes_{phase}") for side in ("baseline", "candidate")}
        )
        yield [Cell(label, f"peak of the {phase}"), words.size(pair.baseline), words.size(pair.candidate), _ratio(pair)]


def _ratio(pair: SizePair) -> Cell:
    return Cell(words.times(pair.ratio), words.change(pair.ratio) if pair.ratio is not None else "")
