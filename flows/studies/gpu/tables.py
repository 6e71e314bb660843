"""The results as Markdown."""

from collections.abc import Iterator, Sequence
from typing import Any

from numprune.flows.studies.gpu.sizes import BATCHES
from numprune.flows.studies.speed.layer import PER_TOKEN

Row = dict[str, Any]


def as_markdown(record: Row) -> str:
    """Return all tables of a record."""
    environment, versions = record["environment"], record["versions"]
    lines = [
        f"# {record['device']}",
        "",
        f"`make gpu`, {record['seconds']:.0f} s; numprune {versions['numprune']}, torch {versions['torch']}, "
        f"transformers {versions['transformers']}, CUDA {versions['cuda'] or 'not available'}. Random weights: these "
        "figures say nothing about quality.",
    ]
    if record["miniature"]:
        lines += ["", "**A miniature that shows that everything runs. Its figures are meaningless.**"]
    if not environment["valid"]:
        lines += ["", f"**Not a valid measurement: {'; '.join(environment['reasons'])}.**"]
    tables = {"checks": _checks, "rates": _rates, "pruning": _pruning, "generation": _generation}
    for name, table in tables.items():
        part = record["parts"][name]
        lines += ["", f"## {name.capitalize()}", ""]
        lines += table(part["rows"], record) if part["rows"] else ["No results."]
        if part["problem"]:
            lines += ["", f"**Incomplete: {_cell(part['problem'])}**"]
    return "\n".join(lines) + "\n"


def _table(header: Sequence[str], rows: Iterator[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]


def _checks(rows: Sequence[Row], record: Row) -> list[str]:
    def result(row: Row) -> str:
        if row["problem"]:
            return f"**failed**: {_cell(row['problem'])}"
        return f"skipped: {row['skipped']}" if row["skipped"] else "passed"

    return _table(["check", "result", "s"], ([row["check"], result(row), f"{row['seconds']:.1f}"] for row in rows))


def _rates(rows: Sequence[Row], record: Row) -> list[str]:
    def cells(row: Row) -> list[str]:
        if "flop_per_s" in row:
            return [f"matrix product, {row['rate']}", f"{_figure(row['flop_per_s'] / 1e12)} TFLOP/s"]
        return ["copy in memory, read and written", f"{_figure(row['bytes_per_s'] / 1e9)} GB/s"]

    return _table(["work", "rate"], map(cells, rows))


def _pruning(rows: Sequence[Row], record: Row) -> list[str]:
    row = rows[-1]  # the one with the most tokens
    size, parts = row["size"], row["parts"]
    forward = parts["forward"]
    rate = next((other["flop_per_s"] for other in record["parts"]["rates"]["rows"] if other["rate"] == "float32"), None)
    lines = [
        f"One layer: hidden size {size['hidden']}, intermediate size {size['intermediate']}, {size['heads']} heads, "
        f"{size['kv_heads']} KV heads; {row['tokens']:,} calibration tokens in float32, of which "
        f"{row['measured_tokens']:,} were run and the rest extrapolated. Peak memory {_memory(row)}.",
        "",
        *_table(
            ["work", "s", "of a forward pass"],
            (
                [name, _figure(took), _figure(took / forward)]
                for name, took in {
                    **parts,
                    **{f"**pruning, `{work}`**": took for work, took in row["whole"].items()},
                }.items()
            ),
        ),
        "",
        f"The dense forward pass of the layer runs at {_figure(row['forward_flop_per_s'] / 1e12)} TFLOP/s"
        + (f", {row['forward_flop_per_s'] / rate:.0%} of the float32 rate above." if rate else "."),
    ]
    if len(rows) > 1:
        apart = ", ".join(
            f"{name} {_figure(rows[0]['parts'][name] / parts[name])}" for name in PER_TOKEN if parts[name]
        )
        lines += ["", f"Extrapolated from {rows[0]['measured_tokens']:,} tokens instead, it would be times: {apart}."]
    return lines


def _generation(rows: Sequence[Row], record: Row) -> list[str]:
    lines = [
        "bfloat16, static KV cache, one CUDA graph for the prefill and one for a decoding step. Speed ratios are "
        "relative to the dense model; the distance of `dense again` from 1 is drift of the device. J/token is the "
        "energy of the whole board per decoded token, including the prefill.",
    ]
    for batch in BATCHES:
        ours = [row for row in rows if row["batch"] == batch]
        if not ours:
            continue
        dense = ours[0]
        header = ["width", "KV heads", "channels", "removed", "weights", "peak memory", "prefill, ms", "ratio"]
        lines += ["", f"Batch {batch}:", ""]
        lines += _table(
            [*header, "decoding step, ms", "ratio", "tokens/s", "J/token"],
            (
                [
                    row["width"],
                    str(row["kv_heads"]),
                    str(row["intermediate"]),
                    f"{row['removed']:.1%}",
                    f"{row['weight_bytes'] / 1e9:.2f} GB",
                    _memory(row),
                    _figure(1e3 * row["prefill_seconds"]),
                    f"{dense['prefill_seconds'] / row['prefill_seconds']:.2f}",
                    _figure(1e3 * row["decode_seconds"]),
                    f"{dense['decode_seconds'] / row['decode_seconds']:.2f}",
                    _figure(batch / row["decode_seconds"]),
                    _energy(row),
                ]
                for row in ours
            ),
        )
    return lines


def _memory(row: Row) -> str:
    peak = row["peak_memory_bytes"]
    return "not measured" if peak is None else f"{peak / 1e9:.1f} GB"


def _energy(row: Row) -> str:
    joules = row["decode_joules_per_token"]
    return "not measured" if joules is None else _figure(joules)


def _figure(value: float) -> str:
    """Format with three significant digits and without exponent."""
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")[:200]
