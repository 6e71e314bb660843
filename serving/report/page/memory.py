"""Section: sizes, and memory while it runs."""

from collections.abc import Callable, Iterator
from itertools import islice

from numprune.serving.report.models import Report, RuntimeMemory, SizePair
from numprune.serving.report.page import charts, words
from numprune.serving.report.page.blocks import Block, Cell, Chart, Pair, Section, Table, Text

_SIZES: tuple[tuple[str, str, Callable[[float | None], str]], ...] = (
    ("parameters", "Parameters", words.number),
    ("weight_bytes", "Weights", words.size),
    ("kv_bytes_per_token", "KV cache per token", words.size),
    ("flops_per_token", "FLOPs per token", words.number),
)
_MAXIMUM_RUNTIMES = 16


def section(report: Report) -> Section:
    rows: list[list[Cell | str]] = []
    bars: list[tuple[str, float | None]] = []
    for key, label, show in _SIZES:
        pair = getattr(report.sizes, key) if report.sizes else None
        if pair is not None:
            rows.append([label, show(pair.baseline), show(pair.candidate), _ratio(pair)])
            bars.append((label, pair.ratio))
    for runtime, found in islice(report.memory.items(), _MAXIMUM_RUNTIMES):
        rows.append(_peak(f"Peak, {runtime}", found))
        bars.append((f"Peak, {runtime}", found.peak_bytes.ratio))
    if not rows:
        return Section("memory", "Memory and size", [Text("Not measured in this run.", "absent")])
    told = "; ".join(f"{label} {words.share(ratio)}" for label, ratio in bars)
    drawn = charts.shares("memory-shares", f"The candidate as a share of the baseline: {told}.", bars)
    table = Table("Memory and size", ("", "Baseline", "Candidate", "Ratio"), rows)
    peaks = "Peaks are of the whole process: device memory on a GPU, resident memory on a CPU."
    blocks: list[Block] = [Text(peaks)] if report.memory else []
    pair_or_table: Block = (
        Pair([Chart(drawn, "Filled: the candidate. Outlined: the baseline, 100 %.")], [table]) if drawn else table
    )
    return Section("memory", "Memory and size", [*blocks, pair_or_table])


def served_rows(found: RuntimeMemory) -> Iterator[list[Cell | str]]:
    """What a server is sized by."""
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
    pair, sides = found.peak_bytes, (found.baseline, found.candidate)
    cells = [
        Cell(words.size(peak), f"load {words.size(side.peak_bytes_load)}\nrun {words.size(side.peak_bytes_run)}")
        for peak, side in zip((pair.baseline, pair.candidate), sides, strict=True)
    ]
    return [label, *cells, _ratio(pair)]


def _ratio(pair: SizePair) -> Cell:
    return Cell(words.times(pair.ratio), words.change(pair.ratio) if pair.ratio is not None else "")
