"""Count verdicts: every estimate comes from the project's own code, and every verdict from a gate on a real report."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np

from numprune import bootstrap, paired
from numprune.flows.studies.error_rates.worlds import METRIC, Items, Machine, Repeat, Text
from numprune.serving import gates
from numprune.serving.benchmark.sections import Look, ratios
from numprune.serving.gates import Gate, Policy
from numprune.serving.power import student
from numprune.serving.report import GateResult, Report

LOSS = "quality.loss_delta"
ACCURACY = "tasks.task.acc.accuracy_delta"
RATIO = f"speed.torch.{METRIC}.ratio"
_FASTER = 1.5  # so far from 1 that the noise floor does not matter


@dataclass(frozen=True)
class Share:
    """A count out of a total."""

    count: int
    of: int

    @property
    def value(self) -> float:
        return self.count / self.of

    @property
    def error(self) -> float:
        """Standard error; for none or all, that of a count of one."""
        inside = min(max(self.value, 1 / self.of), 1 - 1 / self.of)
        return math.sqrt(inside * (1 - inside) / self.of)


@dataclass(frozen=True)
class QualityRates:
    """One world of text with a number of documents.

    Attributes:
        worse_passes: a candidate exactly at the limit passes; a worse one passes less often.
        better_fails: the same candidate fails; a better one fails less often.
        percentile_passes: worse_passes of the plain percentile bootstrap, for comparison.
        equal_passes: a candidate equal to the baseline passes, with a limit at which this is not certain.
        power: the mean of that chance as stated by the gate.
    """

    world: str
    documents: int
    worse_passes: Share
    better_fails: Share
    percentile_passes: Share
    equal_passes: Share
    power: float


@dataclass(frozen=True)
class TaskRates:
    """One world of a task's items, so many of them; the attributes are as of QualityRates."""

    world: str
    items: int
    worse_passes: Share
    better_fails: Share
    equal_passes: Share
    power: float


@dataclass(frozen=True)
class SpeedRates:
    """One machine with a number of repeats.

    Attributes:
        slower_passes: a candidate exactly as slow as the minimum allows passes.
        faster_passes: a candidate exactly as fast as a maximum allows passes (for latencies, the wrong end).
        itself_inside: baseline against itself stays within its noise floor.
        itself_passes: baseline against itself passes a minimum of 1, which is inside the floor.
        equal_passes, power: as in QualityRates, with a minimum below 1.
    """

    world: str
    repeats: int
    slower_passes: Share
    faster_passes: Share
    itself_inside: Share
    itself_passes: Share
    equal_passes: Share
    power: float


@dataclass(frozen=True)
class RerunRates:
    """One machine with a number of repeats per look, for a series of reruns: the share that has passed by each look.

    Attributes:
        slower_passes, faster_passes, itself_passes, equal_passes: as in SpeedRates.
    """

    world: str
    repeats: int
    slower_passes: tuple[Share, ...]
    faster_passes: tuple[Share, ...]
    itself_passes: tuple[Share, ...]
    equal_passes: tuple[Share, ...]


@dataclass(frozen=True)
class ChoiceRates:
    """One world of text with a number of documents, on which the best of several candidates is chosen.

    All of them are exactly at the limit, and any that passes may be the best. Their differences are independent, which
    is the least favourable case: on the same documents candidates pass together.

    Attributes:
        passes: one of the candidates passes.
        uncorrected: one of them passes by bounds that do not allow for their number.
    """

    world: str
    documents: int
    candidates: int
    passes: Share
    uncorrected: Share


def quality_rates(text: Text, documents: int, worlds: int, seed: int) -> QualityRates:
    """Draw `worlds` sets of documents and judge each."""
    generator = np.random.default_rng([seed, documents])
    margin = _margin(_spread_of(text, documents), documents)
    results, percentiles = [], []
    for _ in range(worlds):
        sums, tokens = text.draw(generator, documents)
        results.append(_judge(quality_report(sums, tokens), _at_most(0.0), _at_most(margin)))
        percentiles.append(percentile_bound(sums, tokens, generator) <= 0)
    at_limit, equal = zip(*results, strict=True)
    return QualityRates(
        text.name,
        documents,
        _share(gate.outcome == "pass" for gate in at_limit),
        _share(gate.outcome == "fail" for gate in at_limit),
        _share(percentiles),
        _share(gate.outcome == "pass" for gate in equal),
        float(np.mean([gate.power for gate in equal])),
    )


def choice_rates(text: Text, documents: int, candidates: int, worlds: int, seed: int) -> ChoiceRates:
    """Draw `worlds` sets of candidates, and judge all."""
    generator = np.random.default_rng([seed, documents, candidates])
    passes: list[bool] = []
    uncorrected: list[bool] = []
    for _ in range(worlds):
        alone = [quality_report(*text.draw(generator, documents)) for _ in range(candidates)]
        of_several = [report.model_copy(update={"candidates": candidates}) for report in alone]
        for reports, found in ((of_several, passes), (alone, uncorrected)):
            found.append(any(_judge(report, _at_most(0.0))[0].outcome == "pass" for report in reports))
    return ChoiceRates(text.name, documents, candidates, _share(passes), _share(uncorrected))


def task_rates(world: Items, items: int, worlds: int, seed: int) -> TaskRates:
    """Draw `worlds` sets of answers, of a candidate at the limit and of one that is equal, and judge each."""
    generator = np.random.default_rng([seed, items])
    margin = _margin(math.sqrt(world.flips / items), items)
    rule = Gate(metric=ACCURACY, bound="ci95_lower", min=-margin)
    results = [
        [_judge(task_report(*world.draw(generator, items, change), items), rule)[0] for change in (-margin, 0.0)]
        for _ in range(worlds)
    ]
    at_limit, equal = zip(*results, strict=True)
    return TaskRates(
        world.name,
        items,
        _share(gate.outcome == "pass" for gate in at_limit),
        _share(gate.outcome == "fail" for gate in at_limit),
        _share(gate.outcome == "pass" for gate in equal),
        float(np.mean([gate.power for gate in equal])),
    )


def speed_rates(machine: Machine, repeats: int, worlds: int, seed: int) -> SpeedRates:
    """Draw `worlds` benchmarks of an equal candidate and of one 1.5 times as fast, and judge each."""
    generator = np.random.default_rng([seed, repeats])
    alike = replace(machine, stalls=0.0)
    minimum = _minimum(alike, repeats, generator)
    limits, itself = [], []
    for _ in range(worlds):
        report = speed_report(_faster(machine.draw(generator, repeats), _FASTER))
        limit = machine.truth * _FASTER
        limits.append(_judge(report, _at_least(limit), _at_most_fast(limit)))
        itself.append(_judge(speed_report(alike.draw(generator, repeats)), _at_least(1.0), _at_least(minimum)))
    slower, not_faster = zip(*limits, strict=True)
    at_one, equal = zip(*itself, strict=True)
    return SpeedRates(
        machine.name,
        repeats,
        _share(gate.outcome == "pass" for gate in slower),
        _share(gate.outcome == "pass" for gate in not_faster),
        _share(abs(math.log(gate.value)) <= math.log1p(gate.noise_floor) for gate in at_one),
        _share(gate.outcome == "pass" for gate in at_one),
        _share(gate.outcome == "pass" for gate in equal),
        float(np.mean([gate.power for gate in equal])),
    )


def rerun_rates(machine: Machine, repeats: int, worlds: int, seed: int) -> RerunRates:
    """Draw `worlds` series of benchmarks; an inconclusive one is repeated as often as allowed."""
    generator = np.random.default_rng([seed, repeats, gates.LOOKS])
    alike = replace(machine, stalls=0.0)
    minimum = _minimum(alike, repeats, generator)
    limit = machine.truth * _FASTER
    slower, faster, itself, equal = [], [], [], []
    for _ in range(worlds):
        looks = [_faster(machine.draw(generator, repeats), _FASTER) for _ in range(gates.LOOKS)]
        slower.append(_passes_at(looks, _at_least(limit)))
        faster.append(_passes_at(looks, _at_most_fast(limit)))
        looks = [alike.draw(generator, repeats) for _ in range(gates.LOOKS)]
        itself.append(_passes_at(looks, _at_least(1.0)))
        equal.append(_passes_at(looks, _at_least(minimum)))
    return RerunRates(machine.name, repeats, *(_by_look(passes) for passes in (slower, faster, itself, equal)))


def _passes_at(looks: Sequence[Look[Repeat]], rule: Gate) -> int | None:
    """The look at which a series ends with a pass; None if it does not pass."""
    for number in range(1, len(looks) + 1):
        (gate,) = _judge(speed_report(*looks[:number]), rule)
        if gate.outcome != "inconclusive":
            return number if gate.outcome == "pass" else None
    return None


def _by_look(passes: Sequence[int | None]) -> tuple[Share, ...]:
    return tuple(_share(at is not None and at <= number for at in passes) for number in range(1, gates.LOOKS + 1))


def settled(text: Text, documents: int, worlds: int, seed: int) -> Share:
    """Return how many inconclusive verdicts are settled by the number of documents that they request.

    The true differences are spread evenly around the limit; a world that is not inconclusive is drawn again.
    """
    generator = np.random.default_rng([seed, documents])
    reach = 3 * student(documents) * _spread_of(text, documents)
    ends: list[bool] = []
    while len(ends) < worlds:
        truth = generator.uniform(-reach, reach)
        first = _shifted(text, documents, truth, generator)
        if first.outcome == "inconclusive" and first.samples_needed is not None:
            ends.append(_shifted(text, first.samples_needed, truth, generator).outcome != "inconclusive")
    return _share(ends)


def _shifted(text: Text, documents: int, truth: float, generator: np.random.Generator) -> GateResult:
    sums, tokens = text.draw(generator, documents)
    return _judge(quality_report(sums + truth * tokens, tokens), _at_most(0.0))[0]


# --- from a world to a report ---------------------------------------------------------------------


def quality_report(sums: np.ndarray, tokens: np.ndarray) -> Report:
    """The report of a comparison over these documents."""
    delta = asdict(bootstrap.bootstrap_mean(sums, tokens, "document"))
    side = {"nll_nats_per_token": 3.0, "perplexity": math.exp(3.0)}
    section = {
        "task": "causal-lm",
        "tokens": int(tokens.sum()),
        "documents": len(sums),
        "baseline": side,
        "candidate": side,
        "loss_delta": {**delta, "unit": "nats/token"},
        "perplexity_ratio": delta | {"interval95": (0.0, 9.0), "ci95_lower": 0.0, "ci95_upper": 9.0},
    }
    return _report({"quality": section})


def task_report(lost: int, gained: int, items: int) -> Report:
    """The report of a comparison with these flips."""
    baseline = np.arange(items) < max(lost, (items - gained) // 2)
    candidate = baseline.copy()
    candidate[:lost] = False
    candidate[items - gained :] = True
    found = asdict(paired.paired_accuracy(baseline, candidate))
    return _report({"tasks": {"task": {"acc": {"runtime": "torch", "num_fewshot": 0, **found}}}})


def speed_report(*looks: Look[Repeat]) -> Report:
    """The report of a benchmark with these repeats."""
    section = {
        "load": {},
        "looks": len(looks),
        "warmup": 1,
        "repeats": sum(len(look.baseline) for look in looks),
        "order": "ABBA",
        "failed_requests": 0,
        "baseline": {},
        "candidate": {},
        **ratios(looks, (METRIC,)),
    }
    return _report({"speed": {"torch": section}})


def percentile_bound(sums: np.ndarray, tokens: np.ndarray, generator: np.random.Generator) -> float:
    """The one-sided 95 % upper bound of the plain percentile bootstrap, 1,000 draws."""
    units = generator.integers(0, len(sums), (1000, len(sums)))
    return float(np.quantile(sums[units].sum(1) / tokens[units].sum(1), 0.95))


def _report(sections: Mapping[str, Any]) -> Report:
    machine = {"cpu": "simulated", "cores": 1, "memory_bytes": 1, "platform": "simulated", "valid": True}
    return Report.model_validate(
        {
            "created": datetime(2000, 1, 1, tzinfo=UTC),
            "run_id": "simulated",
            "identity": {"base": "0" * 64, "candidate": "1" * 64},
            "environment": machine,
            **sections,
        }
    )


def _judge(report: Report, *rules: Gate) -> tuple[GateResult, ...]:
    return gates.judge(report, Policy(gates=rules)).gates


def _at_most(limit: float) -> Gate:
    return Gate(metric=LOSS, bound="ci95_upper", max=limit)


def _at_least(limit: float) -> Gate:
    return Gate(metric=RATIO, bound="ci95_lower", min=limit)


def _at_most_fast(limit: float) -> Gate:
    return Gate(metric=RATIO, bound="ci95_upper", max=limit)


def _share(found: Iterable[bool]) -> Share:
    listed = list(found)
    return Share(sum(listed), len(listed))


def _value(look: Look[Repeat]) -> float:
    return float(ratios([look], (METRIC,))[METRIC]["ratio"]["value"])


def _faster(look: Look[Repeat], factor: float) -> Look[Repeat]:
    return replace(look, candidate=[Repeat(one.speed * factor) for one in look.candidate])


def _margin(standard_error: float, n: int) -> float:
    """The limit at which an equal candidate passes about 80 % of the time if everything is normal and equal."""
    return (student(n) + 0.84) * standard_error


def _minimum(machine: Machine, repeats: int, generator: np.random.Generator) -> float:
    """The limit of the ratio with the margin of `_margin`."""
    spread = [math.log(_value(machine.draw(generator, repeats))) for _ in range(200)]
    return math.exp(-_margin(float(np.sqrt(np.mean(np.square(spread)))), repeats))


def _spread_of(text: Text, documents: int) -> float:
    """Standard error of the mean difference over this number of documents, from 2,000 sets of them."""
    generator = np.random.default_rng(documents)
    draws = (text.draw(generator, documents) for _ in range(2000))
    return float(np.std([sums.sum() / tokens.sum() for sums, tokens in draws]))
