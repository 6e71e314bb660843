"""The Pareto front of several candidates: loss, speed and bytes, each with its interval.

A candidate leaves the front only if another one is clearly better: at least as good in all three figures, and in one of
them better beyond both intervals. So one that another beats by noise alone stays. Sizes are exact. A candidate whose
figures were not all measured, or in an invalid environment, is not on the front.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from numprune.serving.metrics import UnfitError, as_number, resolve
from numprune.serving.report import Report, ReportedEstimate

LOSS = "quality.loss_delta"
BYTES = "sizes.weight_bytes.ratio"
_NEAREST = ("vllm", "tensorrt", "onnxruntime", "torch")  # to production, the nearest first


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval; both ends are the value if it is exact."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Point:
    """A candidate: its loss and bytes, of which less is better, and its speed, of which more is."""

    loss: Estimate
    speed: Estimate
    bytes: Estimate


def speed_metric(runtimes: Iterable[str], task: str) -> str:
    """The speed that candidates are compared by: the throughput in the runtime nearest to production."""
    runtime = min(runtimes, key=_NEAREST.index)
    if task != "causal-lm":
        return f"speed.{runtime}.samples_per_s.ratio"
    return f"speed.{runtime}.{'output' if runtime == 'vllm' else 'decode'}_tokens_per_s.ratio"


def point(report: Report, speed: str) -> Point | None:
    """The figures of a report; None if one of them was not measured or does not count.

    Args:
        speed: the metric's path.
    """
    if not report.environment.valid:
        return None
    data = report.to_json()
    try:
        return Point(*(_figure(resolve(data, metric), metric) for metric in (LOSS, speed, BYTES)))
    except UnfitError:
        return None


def on_front(points: Sequence[Point | None]) -> list[bool]:
    """Whether each point is on the front."""
    known = [one for one in points if one is not None]
    return [one is not None and not any(dominates(other, one) for other in known) for one in points]


def dominates(one: Point, other: Point) -> bool:
    """Whether `one` is at least as good in everything, and clearly better in something."""
    pairs = [(one.loss, other.loss), (_mirrored(one.speed), _mirrored(other.speed)), (one.bytes, other.bytes)]
    return all(a.value <= b.value for a, b in pairs) and any(a.high < b.low for a, b in pairs)


def _figure(found: object, metric: str) -> Estimate:
    if isinstance(found, ReportedEstimate):
        low, high = found.interval95
        return Estimate(*(as_number(number, metric) for number in (found.value, low, high)))
    value = as_number(found, metric)
    return Estimate(value, value, value)


def _mirrored(figure: Estimate) -> Estimate:
    return Estimate(-figure.value, -figure.high, -figure.low)
