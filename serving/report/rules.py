"""A gate's rule and result in words."""

from numprune.serving.report import words
from numprune.serving.report.models import GateResult

_BOUNDS = {"point": "value", "ci95_lower": "lower bound", "ci95_upper": "upper bound"}


def rule(gate: GateResult) -> str:
    """`upper bound ≤ 0.25`."""
    return f"{_BOUNDS[gate.bound]} {limit(gate)}"


def limit(gate: GateResult) -> str:
    return f"≥{words.WIDE}{words.plain(gate.min)}" if gate.max is None else f"≤{words.WIDE}{words.plain(gate.max)}"


def judged(gate: GateResult) -> float | None:
    """The figure compared with the limit."""
    if gate.bound == "point" or gate.interval is None:
        return gate.value
    return gate.interval[gate.bound == "ci95_upper"]


def seen(gate: GateResult) -> str:
    """`upper bound 0.31`."""
    return "not measured" if judged(gate) is None else f"{_BOUNDS[gate.bound]} {words.number(judged(gate), 3)}"
