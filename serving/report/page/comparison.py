"""Several reports side by side, and whether their figures are comparable."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any, Final

from numprune.serving.report import names, words
from numprune.serving.report.headline import headline
from numprune.serving.report.models import LossDelta, Pruning, Quality, Report, ReportedEstimate, SizePair, Sizes
from numprune.serving.report.page import charts, identity
from numprune.serving.report.page.blocks import Block, Cell, Chart, Folded, Gallery, Section, Table, Text
from numprune.serving.report.page.charts import Interval
from numprune.serving.report.page.facts import shorten
from numprune.serving.report.page.verdict import HEADLINES, MARKS, outcome_of
from numprune.serving.report.rules import judged, rule

MAXIMUM: Final = len(ascii_uppercase)
_MAXIMUM_ROWS = 100
_MAXIMUM_RUNTIMES = 8
_ABSENT = Cell(words.ABSENT)
_SPEEDS = ("output_tokens_per_s", "decode_tokens_per_s", "prefill_tokens_per_s", "ttft", "samples_per_s", "latency")


@dataclass(frozen=True)
class Entry:
    """One report: its letter and its source."""

    letter: str
    source: str
    report: Report

    @property
    def outcome(self) -> str:
        return outcome_of(self.report)

    @property
    def tone(self) -> str:
        return self.outcome.replace(" ", "-")

    @property
    def mark(self) -> str:
        return MARKS[self.outcome]

    @property
    def headline(self) -> str:
        return HEADLINES[self.outcome]

    @property
    def why(self) -> str:
        return headline(self.report)


def entries(reports: Sequence[tuple[str, Report]]) -> list[Entry]:
    return [Entry(letter, source, report) for letter, (source, report) in zip(ascii_uppercase, reports, strict=False)]


def sections(found: Sequence[Entry]) -> list[Section]:
    return [_comparable(found), _figures(found), _pictures(found), _gates(found), _identities(found)]


# --- comparability -------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """Something that should be equal, and the consequence if it is not."""

    name: str
    consequence: str
    blocking: bool  # figures are not comparable


_BASE = Difference("Base weights", "different models were pruned, so no figures are comparable", True)
_TASK = Difference("Task", "their losses are different quantities, so quality is not comparable", True)
_HELDOUT = Difference("Held-out text", "quality was measured on different text and is not comparable", True)
_CALIBRATION = Difference("Calibration text", "part of the differences may come from it", False)
_MACHINE = Difference("Machine", "times and memory are not comparable, and ratios only with care", True)
_LOAD = Difference("Load", "the benchmarks did different work, so speed is not comparable", True)
_PACKAGES = Difference("Packages", "other versions can change speed and memory", False)


def differences(reports: Sequence[Report]) -> list[tuple[Difference, list[Any]]]:
    """The differences between the reports, with each report's value."""
    of: list[tuple[Difference, list[Any]]] = [
        (_BASE, [report.identity.base for report in reports]),
        (_TASK, _where_known([report.quality.task if report.quality else None for report in reports])),
        (_HELDOUT, [report.identity.heldout_rows for report in reports]),
        (_CALIBRATION, [report.identity.calibration_rows for report in reports]),
        (_MACHINE, [identity.machine(report.environment) for report in reports]),
    ]
    for runtime in _runtimes(reports, "speed"):  # a runtime missing from a report cannot mislead
        loads = [found.load if (found := report.speed.get(runtime)) else None for report in reports]
        of.append((Difference(f"Load of {runtime}", _LOAD.consequence, _LOAD.blocking), _where_known(loads)))
    of.append((_PACKAGES, [report.identity.packages for report in reports]))
    return [(item, values) for item, values in of if any(value != values[0] for value in values)]


def _where_known(values: Sequence[Any]) -> list[Any]:
    """Replace missing values with the first known one."""
    known = next((value for value in values if value), None)
    return [known if value is None else value for value in values]


def _comparable(found: Sequence[Entry]) -> Section:
    blocks: list[Block] = []
    for item, values in differences([entry.report for entry in found]):
        who = _parties([entry.letter for entry in found], values)
        blocks.append(Text(f"{item.name} ({who}): {item.consequence}.", "warn" if item.blocking else "note"))
    if not any(entry.report.identity.heldout_rows for entry in found):
        blocks.append(
            Text("No report identifies its held-out text, so it is unknown whether quality is comparable.", "warn")
        )
    if not blocks:
        blocks.append(Text("Yes: base, held-out and calibration text, machine, load and packages are the same."))
    return Section("comparable", "Are they comparable?", blocks)


def _parties(letters: Sequence[str], values: Sequence[Any]) -> str:
    """Group reports with equal values: `A, C against B`."""
    parties: list[tuple[Any, list[str]]] = []
    for letter, value in zip(letters, values, strict=True):
        party = next((members for same, members in parties if same == value), None)
        if party is None:
            parties.append((value, [letter]))
        else:
            party.append(letter)
    return " against ".join(", ".join(members) for _, members in parties)


# --- figures --------------------------------------------------------------------------------------


def _figures(found: Sequence[Entry]) -> Section:
    rows: list[list[Cell | str]] = [
        [label, *cells] for label, cells in _rows([entry.report for entry in found]) if set(cells) != {_ABSENT}
    ]
    table = Table("Main figures, a column for each report", ("", *(entry.letter for entry in found)), rows)
    return Section("figures", "Main figures", [table])


def _rows(reports: Sequence[Report]) -> Iterator[tuple[str, list[Cell]]]:
    yield "Method", [_method(report.pruning) for report in reports]
    sizes = [report.sizes or Sizes() for report in reports]
    yield "Parameters", [_pair(found.parameters, words.number) for found in sizes]
    yield "KV cache per token", [_pair(found.kv_bytes_per_token, words.size) for found in sizes]
    for label, deltas in _losses(reports).items():
        yield label, [_difference(delta) for delta in deltas]
    yield "Perplexity", [_perplexity(report.quality) for report in reports]
    for runtime, name in _speeds(reports):
        yield f"{words.named(name)}, {runtime}", [_ratio(_speed(report, runtime, name)) for report in reports]
    for runtime in _runtimes(reports, "memory"):
        peaks = [memory.peak_bytes if (memory := report.memory.get(runtime)) else None for report in reports]
        yield f"Peak memory, {runtime}", [_pair(pair, words.size) for pair in peaks]


def _method(found: Pruning | None) -> Cell:
    return Cell(shorten(found.criterion), shorten(f"{found.allocation}, {found.compensation}")) if found else _ABSENT


def _pair(found: SizePair | None, show: Callable[[float | None], str]) -> Cell:
    return Cell(words.times(found.ratio), show(found.candidate)) if found else _ABSENT


def _losses(reports: Sequence[Report]) -> dict[str, list[LossDelta | None]]:
    """Label -> each report's loss, if it has that one."""
    found = [report.quality for report in reports]
    labels = [f"{names.loss(one)}, {one.loss_delta.unit}" if one else None for one in found]
    return {
        label: [one.loss_delta if one and own == label else None for one, own in zip(found, labels, strict=True)]
        for label in dict.fromkeys(label for label in labels if label)
    }


def _difference(delta: LossDelta | None) -> Cell:
    return Cell(words.signed(delta.value), words.interval(delta)) if delta else _ABSENT


def _perplexity(found: Quality | None) -> Cell:
    if found is None or found.candidate is None or found.baseline is None:
        return _ABSENT
    return Cell(words.number(found.candidate.perplexity), f"from {words.number(found.baseline.perplexity)}")


def _ratio(found: ReportedEstimate | None) -> Cell:
    return Cell(words.times(found.value), words.interval(found)) if found else _ABSENT


def _runtimes(reports: Sequence[Report], section: str) -> list[str]:
    found = dict.fromkeys(name for report in reports for name in getattr(report, section))
    return list(found)[:_MAXIMUM_RUNTIMES]


def _speeds(reports: Sequence[Report]) -> Iterator[tuple[str, str]]:
    for runtime in _runtimes(reports, "speed"):
        for name in _SPEEDS:
            if any(_speed(report, runtime, name) for report in reports):
                yield runtime, name


def _speed(report: Report, runtime: str, name: str) -> ReportedEstimate | None:
    ratio = getattr(report.speed[runtime], name) if runtime in report.speed else None
    return ratio.ratio if ratio else None


def _pictures(found: Sequence[Entry]) -> Section:
    reports = [entry.report for entry in found]
    blocks = [
        _forest(f"quality-{number}", label, {e.letter: one for e, one in zip(found, of, strict=True) if one}, 0.0)
        for number, (label, of) in enumerate(_losses(reports).items())
    ]
    for runtime, name in _speeds(reports):
        estimates = {entry.letter: one for entry in found if (one := _speed(entry.report, runtime, name))}
        better = "above 1 is faster" if name in words.RATES else "below 1 is faster"
        label = f"{words.named(name)}, {runtime}: candidate / baseline; {better}"
        blocks.append(_forest(f"speed-{runtime}-{name}", label, estimates, 1.0))
    drawn = [block for block in blocks if block]
    text = Text("Values with two-sided 95 % intervals, one row per report.")
    absent = Text("No report has an interval to draw.", "absent")
    return Section("intervals", "Intervals", [text, Gallery(drawn)] if drawn else [absent])


def _forest(key: str, label: str, estimates: Mapping[str, ReportedEstimate], reference: float) -> Chart | None:
    rows = [Interval(letter, one.value, *one.interval95) for letter, one in estimates.items()]
    told = "; ".join(
        f"{letter} {words.number(one.value, 3)} ({words.interval(one)})" for letter, one in estimates.items()
    )
    drawn = charts.intervals(f"all-{key}", f"{label}, with 95 % intervals: {told}.", rows, reference=reference)
    return Chart(drawn, label) if drawn else None


# --- gates and identities -------------------------------------------------------------------------


def _gates(found: Sequence[Entry]) -> Section:
    """One row per rule; a dash for reports that were not judged by it."""
    rules: dict[tuple[str, str], dict[str, Cell]] = {}
    for entry in found:
        for gate in entry.report.verdict.gates if entry.report.verdict else ():
            cell = Cell(f"{MARKS[gate.outcome]} {gate.outcome}", words.number(judged(gate), 3), gate.outcome)
            rules.setdefault((words.gate(gate, entry.report), rule(gate)), {})[entry.letter] = cell
    if not rules:
        return Section("gates", "Gates", [Text("No report was judged.", "absent")])
    rows: list[list[Cell | str]] = [
        [Cell(name, told), *(cells.get(entry.letter, _ABSENT) for entry in found)]
        for (name, told), cells in list(rules.items())[:_MAXIMUM_ROWS]
    ]
    header = ("Gate", *(entry.letter for entry in found))
    blocks: list[Block] = [Table("Outcome of each gate, a column for each report", header, rows)]
    if len(rules) > _MAXIMUM_ROWS:
        blocks.append(Text("The rest is in each report.json.", "absent"))
    return Section("gates", "Gates", blocks)


def _identities(found: Sequence[Entry]) -> Section:
    by_entry = [identity.digests(entry.report.identity) for entry in found]
    rows: list[list[Cell | str]] = []
    for name in dict.fromkeys(name for digests in by_entry for name in digests):
        values = [digests.get(name) for digests in by_entry]
        note = "same" if len(set(values)) == 1 else "differs"
        rows.append([Cell(name, note), *(Cell((value or words.ABSENT)[:12], tone="code") for value in values)])
    machines = [identity.machine(entry.report.environment) for entry in found]
    rows.append([Cell("Machine", "same" if len(set(machines)) == 1 else "differs"), *map(shorten, machines)])
    header = ("", *(entry.letter for entry in found))
    table = Table("Digests, their first twelve digits; a column for each report", header, rows, numeric=False)
    versions = _versions(found)
    folded = [Folded("Packages whose versions differ", [versions])] if versions else []
    return Section("origin", "Identity", [table, *folded])


def _versions(found: Sequence[Entry]) -> Table | None:
    packages = [entry.report.identity.packages for entry in found]
    installed = sorted({name for versions in packages for name in versions})
    rows: list[list[Cell | str]] = [
        [shorten(name), *(shorten(versions.get(name, words.ABSENT)) for versions in packages)]
        for name in [name for name in installed if len({versions.get(name) for versions in packages}) > 1][
            :_MAXIMUM_ROWS
        ]
    ]
    header = ("Package", *(entry.letter for entry in found))
    return Table("Packages whose versions differ", header, rows, numeric=False) if rows else None
