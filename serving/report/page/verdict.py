"""The summary at a glance: the outcome, the reason, one line per gate, the main figures."""

from collections.abc import Iterator
from dataclasses import dataclass

from numprune.serving.report import names, ratios, rules, words
from numprune.serving.report.headline import headline, next_commands
from numprune.serving.report.models import GateResult, Report

MARKS = {"pass": "✓", "fail": "✕", "inconclusive": "?", "invalid environment": "!", "not judged": words.ABSENT}
HEADLINES = {
    "pass": "Pass",
    "fail": "Fail",
    "inconclusive": "Inconclusive",
    "invalid environment": "Invalid environment",
    "not judged": "Not judged yet",
}
_MAXIMUM_LINES = 50
_RATES = ("output_tokens_per_s", "decode_tokens_per_s", "samples_per_s")  # the first available one is shown


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
    commands: list[str]
    lines: list[Line]
    more: int  # number of gates without a line
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
        why=headline(report),
        commands=list(next_commands(report)),
        lines=[_line(gate, words.gate(gate, report)) for gate in gates[:_MAXIMUM_LINES]],
        more=max(0, len(gates) - _MAXIMUM_LINES),
        tiles=list(_tiles(report)),
    )


def outcome_of(report: Report) -> str:
    return report.verdict.outcome if report.verdict else "not judged"


def _line(gate: GateResult, name: str) -> Line:
    return Line(gate.outcome, MARKS[gate.outcome], name, rules.seen(gate), rules.limit(gate))


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
            told = ratios.reading(name, speed)
            doubt = f"\n{told}" if told in (ratios.UNCLEAR, ratios.TOO_NOISY) else ""
            yield Tile(label, words.times(found.ratio.value), f"{words.interval(found.ratio)}, 95 %{doubt}")
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
