"""The metrics of a policy: dotted paths into a report's JSON, found or refused."""

import difflib
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from pydantic import ValidationError

from numprune.errors import InputError
from numprune.serving.problems import problems
from numprune.serving.report import CAUSAL, UNITS, LossDelta, ReportedEstimate, Task, path_of

LOOKS: Final = 3  # of one benchmark

_COUNTS = ("samples", "tokens", "documents", "repeats")  # what stands beside a measurement and must not be zero
_LEVELS = ("concurrency", "shapes")  # under which a runtime is measured more than once


class UnfitError(Exception):
    """Why the report holds nothing that a gate could pass on."""


def other_task(metric: str, task: Task) -> str | None:
    """Why no report of this task has the metric, and what it has instead; None where nothing is wrong."""
    section, name, *_ = metric.split(".")
    if task == "causal-lm" or section != "quality" or not (path_of(metric) != metric or name in CAUSAL):
        return None
    return (
        f"only models of causal-lm have it, and this one's task is {task}; bound quality.loss_delta, in {UNITS[task]}, "
        "or one of quality.metrics"
    )


def check_task(metrics: Iterable[str], task: Task) -> None:
    """Raises InputError with every metric that no report of the task has."""
    found = [(index, metric, why) for index, metric in enumerate(metrics) if (why := other_task(metric, task))]
    if found:
        raise InputError("; ".join(f"gates.{index}.metric = {metric!r}: {why}" for index, metric, why in found))


def resolve(data: Mapping[str, Any], metric: str) -> Any:
    """What stands at a dotted path: a ReportedEstimate, or whatever is there. Raises UnfitError for nothing of use."""
    node: Any = data
    path: list[str] = []
    for part in path_of(metric).split("."):
        if _is_estimate(node):
            raise UnfitError(f"{metric} reaches into an estimate; the metric is {'.'.join(path)}, with a bound")
        if not isinstance(node, Mapping) or part not in node:
            raise UnfitError(f"the report has no {metric}{_did_you_mean(metric, data)}")
        node = node[part]
        path.append(part)
        if isinstance(node, Mapping):
            _require_measured(node, ".".join(path))
    if not _is_estimate(node):
        return node
    try:
        return (LossDelta if "unit" in node else ReportedEstimate).model_validate(node)
    except ValidationError as error:
        raise UnfitError(f"{metric} is not an estimate: {problems(error)}") from None


def _require_measured(node: Mapping[str, Any], path: str) -> None:
    """Nothing below counts when it rests on no samples, or on the requests that happened to succeed."""
    for name in _COUNTS:
        if name in node and not _is_estimate(node) and not _positive(node[name]):
            raise UnfitError(f"{path}.{name} is {node[name]}: nothing was measured")
    failed = node.get("failed_requests", 0)
    if failed != 0 or isinstance(failed, bool):
        raise UnfitError(f"{path}.failed_requests is {failed}: those that succeeded do not speak for all")


def _positive(count: Any) -> bool:
    return isinstance(count, int) and not isinstance(count, bool) and count > 0


def _is_estimate(node: Any) -> bool:
    return isinstance(node, Mapping) and {"value", "samples"} <= node.keys()


def noise_floor(data: Mapping[str, Any], metric: str) -> float | None:
    """The noise floor of `speed.<runtime>.<name>.ratio`, without which none passes; None for other metrics.

    The same at one of a server's concurrencies, `speed.<runtime>.concurrency.<n>.<name>.ratio`, or an encoder's shapes.
    """
    match metric.split("."):
        case ["speed", *way, name, "ratio"] if len(way) == 1 or (len(way) == 3 and way[1] in _LEVELS):
            where = ".".join(("speed", *way, "noise_floor", name))
            node = data["speed"]
            for part in way:
                node = node[part]
            found = node["noise_floor"].get(name)
            if found is None or found["neighbours"] < 1:
                raise UnfitError(f"{where} was not measured")
            floor = as_number(found["relative"], where)
            if floor < 0:
                raise UnfitError(f"{where} is {floor:g}, below zero")
            return floor
    return None


def looks_of(data: Mapping[str, Any], metric: str) -> int:
    """The looks that a metric rests on: 1 but for repeated benchmarks. Raises UnfitError for more than `LOOKS`."""
    section, runtime, *_ = metric.split(".")
    looks: int = data["speed"][runtime]["looks"] if section == "speed" else 1
    if not 1 <= looks <= LOOKS:
        raise UnfitError(f"speed.{runtime}.looks is {looks}: a benchmark has from 1 to {LOOKS} looks")
    return looks


def _did_you_mean(metric: str, data: Mapping[str, Any]) -> str:
    known = sorted(_metrics(data, ""))
    last = metric.rsplit(".", 1)[-1]
    inside = [path for path in known if all(part in path.split(".") for part in metric.split("."))]
    near = inside or difflib.get_close_matches(metric, known, n=3, cutoff=0.6)
    near = near or [path for path in known if path.endswith(f".{last}")]
    return f"; did you mean {' or '.join(near[:3])}?" if near else ""


def _metrics(node: Any, prefix: str) -> Iterator[str]:
    """Paths that a gate could judge."""
    if _is_estimate(node) or (isinstance(node, int | float) and not isinstance(node, bool)):
        yield prefix
    elif isinstance(node, Mapping):
        for name, item in node.items():
            yield from _metrics(item, f"{prefix}.{name}" if prefix else name)


def as_number(found: Any, name: str) -> float:
    if found is None:
        raise UnfitError(f"{name} was not measured (null, NaN or infinite)")
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise UnfitError(f"{name} is {type(found).__name__}, not a number")
    if not abs(found) <= sys.float_info.max:  # nor does a whole number fit that is larger
        raise UnfitError(f"{name} is {found}")
    return found
