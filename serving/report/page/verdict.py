"""What a reader has to know in two seconds: the outcome, why, each gate in one line, the main figures."""

from collections.abc import Iterator
from dataclasses import dataclass

from numprune.serving.report import names
from numprune.serving.report.models import GateResult, Report
from numprune.serving.report.page import words

MARKS = {"pass": "✓", "fail": "✕", "inconclusive": "?", "invalid environment": "!", "not judged": words.ABSENT}
HEADLINES = {
    "pass": "Pass",
    "fail": "Fail",
    "inconclusive": "Inconclusive",
    "invalid environment": "Invalid environment",
    "not judged": "Not judged yet",
}
_BOUNDS = {"point": "value", "ci95_lower": "lower bound", "ci95_upper": "upper bound"}
_MAXIMUM_LINES = 50
_RATES = ("output_tokens_per_s", "decode_tokens_per_s", "samples_per_s")  # the first that a runtime has is shown


@dataclass(frozen=True)
class Line:
    """One gate."""

    outcome: str
    mark: str
    name: str
    seen: str
    limit: str


@dataclass(frozen=True)
class Tile:
    name: str
    value: str
    note: str


@dataclass(frozen=True)
class Verdict:
    outcome: str
    mark: str
    headline: str
    why: str
    lines: list[Line]
    more: int  # gates without a line
    tiles: list[Tile]

    @property
    def tone(self) -> str:
        """A class of page.css."""
        return self.outcome.replace(" ", "-")


def verdict(report: Report) -> Verdict:
    gates = report.verdict.gates if report.verdict else ()
    outcome = outcome_of(report)
    return Verdict(
        outcome=outcome,
        mark=MARKS[outcome],
        headline=HEADLINES[outcome],
        why=why(report),
        lines=[_line(gate) for gate in gates[:_MAXIMUM_LINES]],
        more=max(0, len(gates) - _MAXIMUM_LINES),
        tiles=list(_tiles(report)),
    )


def outcome_of(report: Report) -> str:
    return report.verdict.outcome if report.verdict else "not judged"


def why(report: Report) -> str:
    """One sentence."""
    if report.verdict is None:
        return "No policy was applied: the figures below are measurements without a verdict."
    gates = report.verdict.gates
    failed = [gate for gate in gates if gate.outcome == "fail"]
    open_ = [gate for gate in gates if gate.outcome == "inconclusive"]
    match report.verdict.outcome:
        case "pass":
            return "The only gate holds." if len(gates) == 1 else f"All {len(gates)} gates hold."
        case "fail":
            return f"{_of(failed, gates)} {'fails' if len(failed) == 1 else 'fail'}: {_told(failed[0])}"
        case "inconclusive":
            return f"{_of(open_, gates)} {'is' if len(open_) == 1 else 'are'} undecided: {_told(open_[0])}"
    return f"The machine was not fit to measure on, so nothing is decided: {report.environment.reasons[0]}."


def rule(gate: GateResult) -> str:
    """`upper bound ≤ 0.25`."""
    return f"{_BOUNDS[gate.bound]} {limit(gate)}"


def limit(gate: GateResult) -> str:
    return f"≥{words.WIDE}{words.plain(gate.min)}" if gate.max is None else f"≤{words.WIDE}{words.plain(gate.max)}"


def judged(gate: GateResult) -> float | None:
    """The figure that is compared with the limit."""
    if gate.bound == "point" or gate.interval is None:
        return gate.value
    return gate.interval[gate.bound == "ci95_upper"]


def _of(some: list[GateResult], gates: tuple[GateResult, ...]) -> str:
    return "The only gate" if len(gates) == 1 else f"{len(some)} of {len(gates)} gates"


def _told(gate: GateResult) -> str:
    return f"{words.metric(gate.metric, gate.unit)}, {gate.reason}."


def _line(gate: GateResult) -> Line:
    seen = "not measured" if judged(gate) is None else f"{_BOUNDS[gate.bound]} {words.number(judged(gate), 3)}"
    return Line(gate.outcome, MARKS[gate.outcome], words.metric(gate.metric, gate.unit), seen, limit(gate))


def _tiles(report: Report) -> Iterator[Tile]:
    if report.sizes and report.sizes.parameters:
        pair = report.sizes.parameters
        yield Tile("Parameters", words.change(pair.ratio), f"{_million(pair.baseline)} → {_million(pair.candidate)}")
    if report.quality:
        delta = report.quality.loss_delta
        yield Tile(
            f"{names.loss(report.quality)}, {delta.unit}", words.signed(delta.value), f"{words.interval(delta)}, 95 %"
        )
    for runtime, speed in report.speed.items():
        known = [name for name in _RATES if getattr(speed, name) is not None]
        for name in known[:1]:
            found = getattr(speed, name)
            label = f"{words.RATES[name]}, {runtime}"
            yield Tile(label, words.times(found.ratio.value), f"{words.interval(found.ratio)}, 95 %")
    if report.sizes and report.sizes.kv_bytes_per_token:
        pair = report.sizes.kv_bytes_per_token
        yield Tile(
            "KV cache per token",
            words.change(pair.ratio),
            f"{words.size(pair.baseline)} → {words.size(pair.candidate)}",
        )


def _million(value: float | None) -> str:
    if value is None or abs(value) < 1e6:
        return words.number(value)
    return f"{words.number(value / 1e9, 3)} B" if abs(value) >= 1e9 else f"{words.number(value / 1e6, 3)} M"
