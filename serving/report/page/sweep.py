"""The page of a sweep: its candidates in charts and tables, each with a link to its report."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from numprune.serving.front import Estimate, Point
from numprune.serving.report import words
from numprune.serving.report.page import charts, render
from numprune.serving.report.page.blocks import Block, Cell, Chart, Gallery, Heading, Section, Table, Text
from numprune.serving.report.page.verdict import MARKS

Axes = tuple[str, str, str]  # loss, speed and bytes

RULE = (
    "A candidate is on the Pareto front unless another one is clearly better: at least as good in loss, speed and "
    "bytes, and in one of them beyond both 95 % intervals. All figures are against the unpruned model."
)


@dataclass(frozen=True)
class Row:
    """A candidate: `outcome` of its run, `note` about it, and a `link` to its report, or to its log if it failed."""

    number: int
    label: str
    outcome: str
    note: str
    link: str
    point: Point | None
    on_front: bool
    chosen: bool


def html(name: str, headline: str, outcome: str, axes: Axes, rows: Sequence[Row]) -> str:
    """The page. The same sweep gives the same page.

    Args:
        name: of the model.
        outcome: of the sweep; "not judged" if it chooses none.
        axes: the names of the three figures.
    """
    tone = outcome.replace(" ", "-")
    sections = [Section("front", "Pareto front", _charts(axes, rows)), _candidates(axes, rows)]
    return render("sweep.html", name=name, headline=headline, tone=tone, sections=sections)


def _charts(axes: Axes, rows: Sequence[Row]) -> list[Block]:
    def spots(pick: Callable[[Point], Estimate]) -> list[charts.Spot]:
        return [
            charts.Spot(str(row.number), pick(row.point), row.point.loss, row.on_front, row.chosen, row.link)
            for row in rows
            if row.point
        ]

    loss, speed, size = axes
    drawn = [
        _chart("front-speed", f"{speed} (higher is better)", loss, spots(lambda point: point.speed)),
        _chart("front-bytes", f"{size} (lower is better)", loss, spots(lambda point: point.bytes)),
    ]
    shown = [chart for chart in drawn if chart]
    if not shown:
        return [Text("No candidate has all figures yet.", "absent")]
    legend = "Filled: on the front. Bars: 95 % intervals. Lines: the unpruned model."
    if any(row.chosen for row in rows):
        legend += " The circle marks the chosen one."
    return [Text(RULE), Text(legend), Gallery(shown)]


def _chart(key: str, axis: str, loss: str, spots: Sequence[charts.Spot]) -> Chart | None:
    told = "; ".join(f"{one.label}: {words.number(one.x.value, 3)}, {words.number(one.y.value, 3)}" for one in spots)
    drawn = charts.scatter(key, f"{axis} and {loss} of each candidate: {told}.", spots, axis, loss)
    return Chart(drawn, f"{loss} (lower is better), by {axis}") if drawn else None


def _candidates(axes: Axes, rows: Sequence[Row]) -> Section:
    blocks: list[Block] = []
    for title, found in (
        ("On the front", [row for row in rows if row.on_front]),
        ("Not on the front", [row for row in rows if not row.on_front]),
    ):
        if found:
            table = Table(f"{title}: verdict and figures", ("Candidate", *axes), [_cells(row) for row in found])
            blocks += [Heading(title), table]
    return Section("candidates", "Candidates", blocks)


def _cells(row: Row) -> list[Cell | str]:
    verdict = f"{MARKS.get(row.outcome, '')} {row.outcome}{': ' if row.note else ''}{row.note}".strip()
    name = Cell(f"{row.number}{' (chosen)' if row.chosen else ''}", f"{row.label}\n{verdict}", link=row.link)
    if row.point is None:
        return [name, *[words.ABSENT] * 3]
    loss, speed, size = row.point.loss, row.point.speed, row.point.bytes
    return [
        name,
        Cell(words.signed(loss.value), words.span(loss.low, loss.high)),
        Cell(words.times(speed.value), words.span(speed.low, speed.high)),
        Cell(words.times(size.value)),
    ]
