"""Section: parity of every export with the checkpoint."""

from collections.abc import Mapping
from itertools import islice
from typing import Any

from numprune.serving.report import words
from numprune.serving.report.models import Report
from numprune.serving.report.page import facts
from numprune.serving.report.page.blocks import Block, Cell, Folded, Section, Table, Text

_COLUMNS = {
    "logprob_error_max": "Largest error",
    "tolerance": "Tolerance",
    "greedy_match": "Greedy match",
}
_OF_ENCODERS = {"output_error_max": "Largest error", "tolerance": "Tolerance"}
_PROMPTS = (
    "The same prompts through the checkpoint and through each export: prefill, decode with the cache, single prompts "
    "and padded batches. An export beyond its tolerance ends the run before it is timed. Errors are of "
    "log-probabilities."
)
_TEXTS = (
    "The same inputs through the checkpoint and through each export, alone and in one batch, texts padded. An export "
    "beyond its tolerance ends the run before it is timed. Errors are of the task's output."
)
_FLOAT64 = (
    "Where float32 rounding exceeds the usual tolerance, the tolerance is a multiple of the checkpoint's own float32 "
    "error, measured against float64."
)
_NOISE = (
    "In half precision there is no fixed tolerance: the mean and the 99th percentile may be a multiple of PyTorch's "
    "own errors in that precision; the tolerance shown is for the percentile. The same holds "
    "where activations are rounded to 8 bits; the multiple is of PyTorch's errors in bfloat16."
)
_WITHIN_WINDOW = "No prompt was longer than the attention windows, so attention beyond them was not compared."
_MAXIMUM_RUNTIMES = 16


def section(report: Report) -> Section:
    if not report.parity:
        return Section("parity", "Parity", [Text("No export was compared with the checkpoint in this run.", "absent")])
    shown = dict(islice(report.parity.items(), _MAXIMUM_RUNTIMES))
    is_encoder = all("output_error_max" in found for found in shown.values())
    columns = _OF_ENCODERS if is_encoder else _COLUMNS
    rows: list[list[Cell | str]] = [
        [runtime, *(_figure(found, key) for key in columns)] for runtime, found in shown.items()
    ]
    blocks: list[Block] = [
        Text(f"{_TEXTS if is_encoder else _PROMPTS} {_FLOAT64}"),
        *([Text(_NOISE)] if any("noise" in found for found in shown.values()) else []),
        *([Text(_WITHIN_WINDOW)] if any(found.get("beyond_window") is False for found in shown.values()) else []),
        Table("Parity with the checkpoint", ("Runtime", *columns.values()), rows),
        *(Folded(f"All details, {runtime}", [facts.block(found)]) for runtime, found in shown.items()),
    ]
    return Section("parity", "Parity", blocks)


def _figure(found: Mapping[str, Any], key: str) -> Cell:
    value, positions = _number(found, key), _number(found, "positions")
    if key.endswith("error_max") and isinstance(noise := found.get("noise"), Mapping):
        rounded = found.get("rounded")
        numbers = rounded.get("weights") if isinstance(rounded, Mapping) else found.get("dtype")
        return Cell(words.plain(value), f"99th percentile {words.plain(_number(noise, 'p99'))}, {numbers}")
    if key != "greedy_match":
        return Cell(words.plain(value))
    return Cell(words.share(value), f"of {words.plain(positions)} positions" if positions is not None else "")


def _number(found: Mapping[str, Any], key: str) -> float | None:
    value = found.get(key)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
