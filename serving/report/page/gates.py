"""Section: each gate's limit on its interval."""

from collections.abc import Iterator

from numprune.serving.report import words
from numprune.serving.report.models import GateResult, Report
from numprune.serving.report.page import charts
from numprune.serving.report.page.blocks import Block, Cell, Chart, Facts, Heading, Pair, Section, Text
from numprune.serving.report.page.charts import Interval, Limit
from numprune.serving.report.page.verdict import MARKS
from numprune.serving.report.rules import judged, rule

_MAXIMUM = 50


def section(report: Report) -> Section:
    if report.verdict is None:
        return Section("gates", "Gates", [Text("No policy was applied.", "absent")])
    gates = report.verdict.gates
    of_several = report.candidates > 1
    bounds = "One-sided bounds" if of_several else "One-sided 95 % bounds"
    blocks: list[Block] = [
        Text(f"Hatched: the forbidden range. The bar spans the {bounds.lower()}; grey is the noise floor.")
    ]
    if of_several:
        blocks.append(
            Text(f"One of {report.candidates:,} candidates: the bounds are wide enough for choosing the best of them.")
        )
    for index, gate in enumerate(gates[:_MAXIMUM]):
        blocks += _gate(index, gate, words.gate(gate, report), bounds)
    if len(gates) > _MAXIMUM:
        blocks.append(Text(f"{len(gates) - _MAXIMUM} more gates are in report.json.", "absent"))
    return Section("gates", "Gates", blocks)


def _gate(index: int, gate: GateResult, name: str, bounds: str) -> Iterator[Block]:
    yield Heading(f"{MARKS[gate.outcome]} {name}: {gate.outcome}")
    items: list[tuple[str, Cell | str]] = [
        ("Rule", rule(gate)),
        ("Value", words.number(gate.value) if gate.value is not None else "not measured"),
        *([(bounds, words.span(*gate.interval))] if gate.interval else []),
        *([("Samples", f"{gate.samples:,}")] if gate.samples is not None else []),
        *([("Samples needed for a verdict", f"{gate.samples_needed:,}")] if gate.samples_needed is not None else []),
        *(
            [("Power", Cell(words.share(gate.power), "chance that an equal model passes"))]
            if gate.power is not None
            else []
        ),
        *([("Noise floor", f"1 ± {words.number(gate.noise_floor, 3)}")] if gate.noise_floor is not None else []),
        ("Outcome", f"{gate.outcome}: {gate.reason}"),
        ("Metric", gate.metric),
    ]
    facts = Facts(items)
    drawn = _drawn(index, gate, name)
    yield Pair([drawn], [facts]) if drawn else facts


def _drawn(index: int, gate: GateResult, name: str) -> Chart | None:
    value = gate.max if gate.max is not None else gate.min
    if value is None or judged(gate) is None:
        return None
    title = f"{name}: {words.number(gate.value)}" + (f", bounds {words.span(*gate.interval)}" if gate.interval else "")
    drawn = charts.intervals(
        f"gate-{index}",
        f"{title}; {rule(gate)}: {gate.outcome}.",
        [Interval("", gate.value, *(gate.interval or (None, None)), gate.noise_floor)],
        reference=1.0 if gate.noise_floor is not None else None,
        limit=Limit(value, gate.max is not None),
    )
    return Chart(drawn) if drawn else None
