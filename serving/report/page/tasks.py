"""Accuracy on tasks, within the section on quality."""

from collections.abc import Iterator

from numprune.counted import counted
from numprune.serving.report import names, words
from numprune.serving.report.models import Report, TaskAccuracy
from numprune.serving.report.page import charts
from numprune.serving.report.page.blocks import Block, Cell, Chart, Heading, Pair, Table, Text
from numprune.serving.report.page.charts import Interval

_MAXIMUM = 200  # rows


def blocks(report: Report) -> Iterator[Block]:
    """Nothing without tasks."""
    found = names.accuracies(report.tasks)
    if not found:
        return
    yield Heading("Tasks")
    yield Text(
        f"{names.answered(report.tasks)} Difference: candidate minus baseline on the same items, with a two-sided "
        "95\N{NO-BREAK SPACE}% interval (Tango's score method). p: McNemar's exact test that both kinds of flips are "
        "equally likely."
    )
    header = ("Task", "Baseline", "Candidate", "Difference", "Right to wrong", "Wrong to right", "p")
    table = Table("Accuracy on tasks", header, [_row(name, one) for name, one in found[:_MAXIMUM]])
    deltas = [(name, one.accuracy_delta) for name, one in found]
    drawn = charts.intervals(
        "tasks-accuracy",
        "Change of accuracy: "
        + "; ".join(f"{name} {words.signed(delta.value)}, {words.interval(delta)}" for name, delta in deltas),
        [Interval(name, delta.value, *delta.interval95) for name, delta in deltas],
        axis="Difference of accuracy",
        reference=0.0,
    )
    yield Pair([Chart(drawn, "Change of accuracy with its interval; 0 is no change.")], [table]) if drawn else table
    if len(found) > _MAXIMUM:
        yield Text("The rest is in report.json.", "absent")


def _row(name: str, found: TaskAccuracy) -> list[Cell | str]:
    delta = found.accuracy_delta
    return [
        Cell(name, counted(found.items, "item")),
        words.share(found.baseline),
        words.share(found.candidate),
        Cell(words.signed(delta.value), words.interval(delta)),
        f"{found.right_to_wrong:,}",
        f"{found.wrong_to_right:,}",
        words.number(found.mcnemar_p, 2),
    ]
