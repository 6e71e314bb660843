"""Policies, and verdicts on reports.

A gate compares one metric with one limit. It passes only on evidence: a metric that is missing, not a number, without
samples or unknown fails; an interval that straddles the limit is inconclusive.

With `bound = "ci95_upper"` and `max = L` (mirrored for `ci95_lower` and `min`), for an estimate v with the one-sided
95 % bounds l and u:

    pass           u <= L
    fail           l > L
    inconclusive   l <= L < u; `power` computes how many samples would give a verdict

So a candidate whose true value is beyond the limit passes at most as often as its bound is wrong, nominally 5 %. All
gates must pass: a candidate that is bad in one respect passes no more often than that one gate errs, however many gates
there are. Each additional gate lowers the chance of a good candidate; `GateResult.power` is the chance that one gate
leaves to a candidate equal to the baseline.

An inconclusive benchmark may be repeated: the new repeats are pooled with the earlier ones and judged together, at most
`LOOKS` times. Each look is another chance for a bad candidate. From the second look on, u and l are therefore one-sided
97.5 % bounds, the ends of the two-sided 95 % interval: a candidate at its limit passes within three looks about 7.5 %
of the time, and 5 % of the time at the first (counted by `python -m numprune.flows.studies.error_rates`).

A report that is one of K candidates, of which the best is published, is judged by bounds of K times smaller error: 1 -
5 % / K, or 1 - 2.5 % / K from the second look on. Whichever candidate is chosen, by whatever rule and on the same
measurements, one beyond its limit is then published nominally at most 5 % of the time at the first look, and 10 %
within three (Bonferroni's inequality). Reports have bounds of 95 % and 97.5 % only; the interval's ends are moved
outwards from the value by t(1 - 5 % / K) / t(97.5 %), for ratios in their logarithms. That is too little for few
documents of skewed lengths: with 20, one of twelve candidates at the limit passes 9 to 14 % of the time (50 to 60 %
without the correction; counted by `python -m numprune.flows.studies.error_rates`).

A speed ratio has a noise floor f: the baseline against itself lies within 1 ± f. A limit closer to 1 than f is replaced
by the far edge of the floor, and a result that does not clear it is inconclusive. f falls as 1 / sqrt(repeats), so
ceil(n (f / |L - 1|)^2) repeats bring it down to the limit.
"""

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from numprune.errors import InputError, IntegrityError
from numprune.serving.metrics import LOOKS, UnfitError, as_number, check_task, looks_of, noise_floor, resolve
from numprune.serving.power import CONFIDENCE, MAXIMUM, SETTLED, power, samples_needed, student
from numprune.serving.problems import described, listed, problems
from numprune.serving.report import GateResult, LossDelta, Outcome, Report, ReportedEstimate, Verdict, overall, path_of

EXIT_CODES: Mapping[Outcome, int] = MappingProxyType(
    {"pass": 0, "fail": 2, "inconclusive": 3, "invalid environment": 4}
)

MAXIMUM_POLICY_BYTES = 1 << 20

_LARGEST_EXPONENT = 700.0  # e to this is finite
_LATER_CONFIDENCE = 0.975  # from the second look on; one-sided

# The value of a candidate equal to the baseline, by the metric's suffix.
_EQUAL = {"loss_delta": 0.0, "accuracy_delta": 0.0, "delta": 0.0, "perplexity_ratio": 1.0, "ratio": 1.0}

Limit = Annotated[float, Field(strict=True, allow_inf_nan=False)]


class Gate(BaseModel):
    """One rule. A minimum uses the lower bound and a maximum the upper bound; otherwise noise would help to pass."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    metric: str = Field(pattern=r"^[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)+$", description="a dotted path into report.json")
    bound: Literal["point", "ci95_lower", "ci95_upper"]
    min: Limit | None = None
    max: Limit | None = None

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        if (self.min is None) == (self.max is None):
            raise ValueError("give either min or max; a range needs two gates")
        if self.min is not None and self.bound == "ci95_upper":
            raise ValueError("min needs bound ci95_lower or point: an upper bound rises with noise")
        if self.max is not None and self.bound == "ci95_lower":
            raise ValueError("max needs bound ci95_upper or point: a lower bound falls with noise")
        return self


class Policy(BaseModel):
    """The gates of a release, at least one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    gates: tuple[Gate, ...]

    @field_validator("gates")
    @classmethod
    def _at_least_one(cls, gates: tuple[Gate, ...]) -> tuple[Gate, ...]:
        if not gates:
            raise ValueError("must have at least one gate")
        return gates


def read_policy(path: Path) -> Policy:
    """Read a TOML file of `[[gates]]`. Raises InputError with a line per problem: field, value, allowed values."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAXIMUM_POLICY_BYTES + 1)
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(f"policy {path}: no such file") from None
    if len(raw) > MAXIMUM_POLICY_BYTES:
        raise InputError(f"policy {path}: exceeds the {MAXIMUM_POLICY_BYTES:,}-byte limit")
    try:
        return Policy.model_validate(tomllib.loads(raw.decode("utf-8")))
    except ValidationError as error:
        raise InputError(listed(f"policy {path}", described(error, Policy))) from None
    except (ValueError, RecursionError) as error:  # TOML's own and Unicode's errors are ValueErrors
        raise InputError(f"policy {path}: not TOML: {error}") from None


def judge(report: Report, policy: Policy) -> Verdict:
    """Judge the report by every gate of the policy, ignoring any verdict that the report already has.

    Raises InputError for a gate on a figure that no report of this task has, since it could never pass.
    """
    if report.quality is not None:
        check_task((gate.metric for gate in policy.gates), report.quality.task)
    data = report.to_json()
    gates = tuple(_judge_gate(data, gate) for gate in policy.gates)
    valid = report.environment.valid
    outcome = overall(gate.outcome for gate in gates) if valid else "invalid environment"
    return Verdict(outcome=outcome, gates=gates, judged=report.digest)


def exit_code(verdict: Verdict) -> int:
    """The exit code of every command that ends in this verdict."""
    return EXIT_CODES[verdict.outcome]


def confirm(report: Report) -> None:
    """Judge a report by the gates of its own verdict. Raises IntegrityError if the outcome differs."""
    if report.verdict is None:
        raise InputError(f"report {report.run_id}: not judged")
    claimed = report.verdict.gates
    try:
        policy = Policy(gates=tuple(Gate(metric=g.metric, bound=g.bound, min=g.min, max=g.max) for g in claimed))
    except ValidationError as error:
        raise IntegrityError(f"report {report.run_id}: its verdict has an invalid gate: {problems(error)}") from None
    for said, is_so in zip(claimed, judge(report, policy).gates, strict=True):
        if said.outcome != is_so.outcome:
            raise IntegrityError(
                f"report {report.run_id}: its verdict says {said.outcome} for {said.metric}, but its measurements give "
                f"{is_so.outcome}: {is_so.reason}"
            )


def next_look(report: Report) -> list[str]:
    """The runtimes that another look may settle in an inconclusive report.

    None if something other than a speed is inconclusive (quality never changes on the same text), or if one of the
    runtimes has used all its `LOOKS`.
    """
    gates = report.verdict.gates if report.verdict and report.verdict.outcome == "inconclusive" else ()
    paths = [gate.metric.split(".") for gate in gates if gate.outcome == "inconclusive"]
    runtimes = sorted({runtime for section, runtime, *_ in paths if section == "speed"})
    spent = [runtime for runtime in runtimes if report.speed[runtime].looks >= LOOKS]
    return [] if spent or any(section != "speed" for section, *_ in paths) else runtimes


# --- one gate -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Evidence:
    """What a gate judges, oriented so that smaller is better: minima are negated."""

    value: float
    best: float  # the bound farther from the limit
    worst: float  # the bound that must be within the limit
    limit: float
    samples: int | None
    sign: int  # -1 if negated
    confidence: float = CONFIDENCE  # confidence of the bounds


def _judge_gate(data: Mapping[str, Any], gate: Gate) -> GateResult:
    seen: dict[str, Any] = {}  # what is known, even if it is not enough to judge
    try:
        found = resolve(data, gate.metric)
        looks, candidates = looks_of(data, gate.metric), data["candidates"]
        floor = noise_floor(data, gate.metric)
        evidence = _evidence(found, gate, looks, candidates, seen)
        chance = seen["power"] = _power(evidence, gate, floor)
        outcome, reason, needed = _decide(evidence, gate.bound, chance)
        if floor is not None:
            seen["noise_floor"] = floor
            outcome, reason, needed = _mind_noise(evidence, gate, floor, (outcome, reason, needed))
        if gate.bound != "point" and (looks, candidates) != (1, 1):
            told = [f"look {looks} of {LOOKS}"] if looks > 1 else []
            told += [f"one of {candidates} candidates"] if candidates > 1 else []
            reason += f"; {', '.join(told)}, judged by {100 * evidence.confidence:.6g} % bounds"
        if isinstance(found, ReportedEstimate) and found.sampling_unit == "window":
            reason += "; its samples are windows of too few documents, so it holds for this text only"
    except UnfitError as why:
        outcome, reason, needed = "fail", str(why), None
    return GateResult(**gate.model_dump(), **seen, outcome=outcome, reason=reason, samples_needed=needed)


_Decision = tuple[Literal["pass", "fail", "inconclusive"], str, int | None]


def _decide(evidence: _Evidence, bound: str, chance: float | None) -> _Decision:
    """The decision table in this module's docstring."""
    if evidence.worst <= evidence.limit:
        return "pass", "within the limit", None
    if evidence.best > evidence.limit:
        return "fail", "beyond the limit" if bound == "point" else "the whole interval is beyond the limit", None
    assert evidence.samples is not None  # a plain number has no interval
    value = evidence.value
    distance = evidence.limit - value
    needed = samples_needed(
        evidence.samples, value - evidence.best, evidence.worst - value, distance, evidence.confidence
    )
    remedy = "no number of samples would settle it" if needed is None else f"about {needed} samples would settle it"
    reason = f"the interval straddles the limit; {remedy}"
    if chance is not None and chance < SETTLED:
        reason += f" (with {evidence.samples} a candidate equal to the baseline passes {chance:.0%} of the time)"
    return "inconclusive", reason, needed


def _power(evidence: _Evidence, gate: Gate, floor: float | None) -> float | None:
    """Chance that a candidate equal to the baseline passes; None if it should not, and for points."""
    equal = _EQUAL.get(path_of(gate.metric).rsplit(".", 1)[-1])
    if gate.bound == "point" or equal is None or evidence.samples is None:
        return None
    margin = evidence.limit - evidence.sign * equal
    if margin <= 0:
        return None
    if floor is not None and margin < floor:
        margin = -floor  # the edge to clear
    error = (evidence.worst - evidence.value) / student(evidence.samples, evidence.confidence)
    return power(evidence.samples, error, margin, evidence.confidence)


def _mind_noise(evidence: _Evidence, gate: Gate, floor: float, decided: _Decision) -> _Decision:
    """Handle a limit inside the noise floor: a pass must clear the noise."""
    limit = evidence.sign * evidence.limit
    if abs(limit - 1) >= floor:
        return decided
    outcome, reason, needed = decided
    note = f"the limit {limit:g} is tighter than the noise floor 1 ± {floor:.3g}"
    clear = -(1 + floor) if gate.min is not None else 1 - floor
    if outcome == "pass" and evidence.worst <= clear:
        return outcome, f"{reason}; {note}, which it clears", needed
    if outcome == "fail":
        return outcome, f"{reason}; {note}", needed
    quiet = _repeats_for(floor, limit, evidence.samples)
    remedy = "loosen the limit or use a quieter machine" + ("" if quiet is None else f", or run about {quiet} repeats")
    if outcome == "pass":
        return "inconclusive", f"{note}, and the result is within it: {remedy}", quiet
    return outcome, f"{reason}; {note}: {remedy}", None if quiet is None or needed is None else max(quiet, needed)


def _repeats_for(floor: float, limit: float, repeats: int | None) -> int | None:
    """The number of repeats that bring the noise floor down to the limit; None if that is not a useful number."""
    distance = abs(limit - 1)
    needed = math.inf if distance == 0 or repeats is None else repeats * (floor / distance) ** 2
    return math.ceil(needed) if needed < 1e9 else None


def _evidence(found: Any, gate: Gate, looks: int, candidates: int, seen: dict[str, Any]) -> _Evidence:
    sign = 1 if gate.max is not None else -1
    limit = gate.max if gate.max is not None else gate.min
    assert limit is not None  # Gate has exactly one
    if not isinstance(found, ReportedEstimate):
        number = as_number(found, gate.metric)
        seen["value"] = number
        if gate.bound != "point":
            raise UnfitError(f'{gate.metric} is a plain number without an interval; use bound = "point"')
        return _Evidence(sign * number, sign * number, sign * number, sign * limit, None, sign)
    *judged, confidence = _bounds(found, gate.metric, looks, candidates)
    seen |= {"value": found.value, "interval": judged, "samples": found.samples}
    if isinstance(found, LossDelta):
        seen["unit"] = found.unit
    if found.samples < 1:
        raise UnfitError(f"{gate.metric} has no samples")
    value = as_number(found.value, gate.metric)
    if gate.bound == "point":
        return _Evidence(sign * value, sign * value, sign * value, sign * limit, found.samples, sign)
    if found.samples < 2:
        raise UnfitError(f"{gate.metric} has only one sample, so no interval")
    if found.samples > MAXIMUM:
        raise UnfitError(f"{gate.metric} claims an impossible number of samples, over {MAXIMUM}")
    lower, upper, first, last = (
        as_number(bound, f"a bound of {gate.metric}") for bound in (*judged, *found.interval95)
    )
    slack = 1e-9 * max(abs(first), abs(last))
    if not first - slack <= value <= last + slack:
        raise UnfitError(f"{gate.metric}: its value {value:g} is outside its own interval [{first:g}, {last:g}]")
    # A bootstrap's one-sided bound can exclude its own value through rounding or skew; the worse of the two is judged.
    bounds = sorted((sign * min(lower, value), sign * max(upper, value)))
    return _Evidence(sign * value, bounds[0], bounds[1], sign * limit, found.samples, sign, confidence)


def _bounds(found: ReportedEstimate, metric: str, looks: int, candidates: int) -> tuple[Any, Any, float]:
    """The one-sided bounds for this look of one of so many candidates, and their confidence."""
    if candidates == 1 and looks == 1:
        return found.ci95_lower, found.ci95_upper, CONFIDENCE
    value, (low, high) = found.value, found.interval95
    if candidates == 1:
        return low, high, _LATER_CONFIDENCE
    confidence = 1 - (1 - (CONFIDENCE if looks == 1 else _LATER_CONFIDENCE)) / candidates
    if value is None or low is None or high is None or not 2 <= found.samples <= MAXIMUM:  # refused by the caller
        return low, high, confidence
    wider = student(found.samples, confidence) / student(found.samples, _LATER_CONFIDENCE)
    if _EQUAL.get(path_of(metric).rsplit(".", 1)[-1]) == 1 and min(low, value) > 0:
        logs = (wider * (math.log(end) - math.log(value)) for end in (low, high))  # a quotient may round to 0
        lower, upper = (value * math.exp(min(log, _LARGEST_EXPONENT)) for log in logs)
        return lower, upper, confidence
    return value + wider * (low - value), value + wider * (high - value), confidence
