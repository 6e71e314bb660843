"""Turns samples into sections of the report."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite, nan
from typing import Any, Generic, Protocol, TypeVar

from numprune.serving.benchmark.estimators import noise_floor, paired_ratio, percentiles
from numprune.serving.benchmark.load import Load, interleaving
from numprune.serving.benchmark.samples import ENERGY, METRICS, Repeat

Section = dict[str, Any]


class Measured(Protocol):
    """One repeat of one side."""

    @property
    def failed(self) -> int:
        """Requests."""
        ...

    def metrics(self) -> Mapping[str, float]:
        """By name; NaN for metrics that the repeat lacks."""
        ...


R = TypeVar("R", bound=Measured)


@dataclass(frozen=True)
class Look(Generic[R]):
    """The repeats of one benchmark, in the order "ABBAABBA…". Those with the same index form a pair."""

    baseline: Sequence[R]
    candidate: Sequence[R]


def repeats_of(looks: Sequence[Look[R]]) -> tuple[list[R], list[R]]:
    """All repeats of the baseline, and all of the candidate."""
    return [one for look in looks for one in look.baseline], [one for look in looks for one in look.candidate]


def speed_section(load: Load, looks: Sequence[Look[Repeat]], descriptions: Mapping[str, Any]) -> Section:
    """`speed.<runtime>`, over all looks. Pairs with a failed request are excluded from ratios.

    A ratio with fewer than two remaining pairs is omitted, and so is a noise floor without two consecutive baseline
    repeats; a gate on either fails.
    """
    return {
        "load": load.describe(),
        "runtime": dict(descriptions),
        "warmup": load.warmup,
        **measured(looks, _side, (*METRICS, ENERGY)),
    }


def measured(looks: Sequence[Look[R]], side: Callable[[Sequence[R]], Section], metrics: Sequence[str]) -> Section:
    """The repeats of all looks in the form of `speed.<runtime>`; `side` summarizes one side."""
    baseline, candidate = repeats_of(looks)
    return {
        "looks": len(looks),
        "repeats": len(baseline),
        "order": interleaving(len(baseline)),
        "failed_requests": sum(repeat.failed for repeat in [*baseline, *candidate]),
        "baseline": side(baseline),
        "candidate": side(candidate),
        **ratios(looks, metrics),
    }


def ratios(looks: Sequence[Look[R]], metrics: Sequence[str]) -> Section:
    """For each metric `{"ratio": estimate}`, and `noise_floor` by metric, over all looks.

    Omitted as in `speed_section`; so is a metric that is zero or NaN in any pair, which has no ratio.
    """
    pairs = [
        (first.metrics(), second.metrics())
        for look in looks
        for first, second in zip(look.baseline, look.candidate, strict=True)
        if not (first.failed or second.failed)
    ]
    # In "ABBAABBA…" the baseline's repeats 1 and 2, 3 and 4, … are consecutive; repeats of different looks are not.
    neighbours = [
        (first.metrics(), second.metrics())
        for look in looks
        for first, second in zip(look.baseline[1:-1:2], look.baseline[2::2], strict=True)
        if not (first.failed or second.failed)
    ]
    usable = [
        metric
        for metric in metrics
        if all(0 < side.get(metric, 0) < inf for pair in [*pairs, *neighbours] for side in pair)
    ]
    found: Section = {
        "noise_floor": {
            metric: noise_floor(
                *([(one[metric], other[metric]) for one, other in found] for found in (neighbours, pairs))
            )
            for metric in usable
            if neighbours and pairs
        },
    }
    if len(pairs) >= 2:
        for metric in usable:
            ratio = paired_ratio([pair[1][metric] for pair in pairs], [pair[0][metric] for pair in pairs])
            found[metric] = {"ratio": ratio}
    return found


def by_repeat(repeats: Sequence[Measured], metrics: Sequence[str]) -> dict[str, list[float | None]]:
    """The value of each repeat; None if a request failed or the value is NaN.

    Energy is left out if it was not measured.
    """
    measured = [{} if repeat.failed else repeat.metrics() for repeat in repeats]
    values = {
        metric: [value if isfinite(value) else None for value in (found.get(metric, nan) for found in measured)]
        for metric in metrics
    }
    if not any(value is not None for value in values.get(ENERGY, [])):
        values.pop(ENERGY, None)
    return values


def mean_of(values: Sequence[float | None]) -> float | None:
    """Return the mean over the repeats that have a value; all do the same work. None if no repeat has one."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def memory_section(baseline: Mapping[str, Any], candidate: Mapping[str, Any]) -> Section:
    """`memory.<runtime>`, from each worker's own report. `peak_bytes` is the higher of the load and run peaks.

    Unknown peaks are None, and so is their ratio; a gate on them fails.
    """
    keys = ("peak_bytes_load", "peak_bytes_run", "weight_bytes", "kv_bytes_per_token")
    before, after = _peak(baseline), _peak(candidate)
    return {
        "baseline": {key: baseline[key] for key in keys},
        "candidate": {key: candidate[key] for key in keys},
        "peak_bytes": {"baseline": before, "candidate": after, "ratio": after / before if before and after else None},
    }


def _peak(side: Mapping[str, Any]) -> int | None:
    return None if side["peak_bytes_run"] is None else max(side["peak_bytes_load"], side["peak_bytes_run"])


def _side(repeats: Sequence[Repeat]) -> Section:
    """Percentiles and rates over all batches and steps in which every request succeeded."""
    batches = tuple(batch for repeat in repeats for batch in repeat.batches if not batch.failed)
    rates = Repeat(batches, 0.0, 0.0).metrics() if batches else {}
    by_repeats = by_repeat(repeats, (*METRICS, ENERGY))
    return {
        "ttft_ms": percentiles([batch.ttft_ms for batch in batches]),
        "itl_ms": percentiles([step for batch in batches for step in batch.itl_ms]),
        "e2e_ms": percentiles([batch.e2e_ms for batch in batches]),
        "decode_tokens_per_s": rates.get("decode_tokens_per_s"),
        "prefill_tokens_per_s": rates.get("prefill_tokens_per_s"),
        ENERGY: mean_of(by_repeats.get(ENERGY, [])),
        "by_repeat": by_repeats,
    }
