"""Gate results and the verdict."""

from collections.abc import Iterable
from typing import Literal, Self

from pydantic import Field, model_validator

from numprune.serving.report.models.fields import Count, Model, Number, Sha256

Outcome = Literal["pass", "fail", "inconclusive", "invalid environment"]


class GateResult(Model):
    """One gate: its rule, the evidence, and the outcome.

    `interval` holds the one-sided bounds used (95 %; 97.5 % from a benchmark's second look on). `power` is the chance
    that a candidate equal to the baseline passes with this many samples and this spread; None if it should not pass, or
    if there is no interval. `unit`: of the value, if any.
    """

    metric: str
    bound: Literal["point", "ci95_lower", "ci95_upper"]
    min: Number = None
    max: Number = None
    value: Number = None
    unit: str | None = None
    interval: tuple[Number, Number] | None = None
    samples: Count | None = None
    noise_floor: Number = None
    power: Number = None
    outcome: Literal["pass", "fail", "inconclusive"]
    reason: str
    samples_needed: Count | None = None


class Verdict(Model):
    """The gates and their combined outcome. A verdict that contradicts its gates cannot be created or read.

    `judged` is the digest of the judged report: a report altered afterwards cannot be read.
    """

    outcome: Outcome
    gates: tuple[GateResult, ...] = Field(min_length=1)
    judged: Sha256 | None = None

    @model_validator(mode="after")
    def _follows(self) -> Self:
        expected = overall(gate.outcome for gate in self.gates)
        if self.outcome not in (expected, "invalid environment"):
            raise ValueError(f"outcome {self.outcome!r} does not follow from the gates, which give {expected!r}")
        return self


def overall(outcomes: Iterable[Literal["pass", "fail", "inconclusive"]]) -> Outcome:
    """One failure fails; otherwise one inconclusive gate makes it inconclusive; without gates there is no pass."""
    seen = set(outcomes)
    if "fail" in seen or not seen:
        return "fail"
    return "inconclusive" if "inconclusive" in seen else "pass"
