"""Tables and figures of the report in Markdown."""

from collections.abc import Iterable, Sequence
from typing import Any

from numprune.serving.report.models import ReportedEstimate

ABSENT = "-"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    cells = [[cell(text) for text in row] for row in rows]
    return [
        f"| {' | '.join(header)} |",
        f"| {' | '.join('---' for _ in header)} |",
        *(f"| {' | '.join(row)} |" for row in cells),
        "",
    ]


def cell(text: str) -> str:
    """Escape text from a report: no markup, no line break, no cell separator."""
    escaped = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    for mark in "\\`|*":
        escaped = escaped.replace(mark, f"\\{mark}")
    return escaped.replace("](", "] (")  # no link


def figure(value: float | None) -> str:
    """Four significant digits, integers whole."""
    if value is None:
        return ABSENT
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def amount(value: float | None) -> str:
    return ABSENT if value is None else f"{value:,.0f}"


def share(value: float | None) -> str:
    return ABSENT if value is None else f"{100 * value:.1f} %"


def estimate(found: ReportedEstimate) -> str:
    lower, upper = found.interval95
    return f"{figure(found.value)} [{figure(lower)}, {figure(upper)}] (n = {found.samples})"


def plain(value: Any) -> str:
    """A free-form fact: numbers shortened, the rest unchanged."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(plain(item) for item in value)
    if value is None or isinstance(value, bool | str):
        return ABSENT if value is None else str(value).lower() if isinstance(value, bool) else value
    return figure(value)
