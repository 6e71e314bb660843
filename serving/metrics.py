"""The metrics of a policy: dotted paths into a report's JSON."""

import difflib
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from pydantic import ValidationError

from numprune.errors import InputError
from numprune.serving.problems import problems
from numprune.serving.report import CAUSAL, UNITS, LossDelta, ReportedEstimate, Task, path_of

LOOKS: Final = 3  # of one benchmark

_COUNTS = ("samples", "tokens", "documents", "repeats")  # counts beside a measurement that must not be zero
_LEVELS = ("concurrency", "shapes")  # keys under which a runtime has several measurements


class UnfitError(Exception):
    """Why a metric has no value that a gate could pass on."""


def other_task(metric: str, task: Task) -> str | None:
    """Why no report of this task has the metric, and what to use instead; None if the metric is valid."""
    section, name, *_ = metric.split(".")
    if (section, name) == ("quality", "accuracy_delta") and not task.endswith("classification"):
        return f"only classifiers have it, and this model's task is {task}; use quality.loss_delta, in {UNITS[task]}"
    if task == "causal-lm" or section != "quality" or not (path_of(metric) != metric or name in CAUSAL):
        return None
    return (
        f"only causal-lm models have it, and this model's task is {task}; use quality.loss_delta, in {UNITS[task]}, "
        "or one of quality.metrics"
    )


def check_task(metrics: Iterable[str], task: Task) -> None:
    """Raises InputError naming every metric that no report of the task has."""
    found = [(index, metric, why) for index, metric in enumerate(metrics) if (why := other_task(metric, task))]
    if found:
        raise InputError("; ".join(f"gates.{index}.metric = {metric!r}: {why}" for index, metric, why in found))


def resolve(data: Mapping[str, Any], metric: str) -> Any:
    """The value at a dotted path: a ReportedEstimate, or plain JSON. Raises UnfitError if it is unusable."""
    _require_no_estimate(data, metric)
    node: Any = data
    path: list[str] = []
    for part in path_of(metric).split("."):
        if _is_estimate(node):
            raise UnfitError(f"{metric} points inside an estimate; use {'.'.join(path)} with a bound")
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


def _require_no_estimate(data: Mapping[str, Any], metric: str) -> None:
    """Reject speeds of a model whose sizes follow from an estimate for another device than the benchmark's."""
    latency = (data.get("pruning") or {}).get("latency") or {}
    device = latency.get("estimated_for")
    if device is not None and metric.startswith(("speed.", "pruning.latency.")):
        raise UnfitError(
            f"the sizes were chosen by latencies estimated for {device}, not measured: no gate on a speed can pass; "
            "measure the table of latencies on the target"
        )


def _require_measured(node: Mapping[str, Any], path: str) -> None:
    """Reject figures without samples, or from only the successful requests."""
    for name in _COUNTS:
        if name in node and not _is_estimate(node) and not _positive(node[name]):
            raise UnfitError(f"{path}.{name} is {node[name]}: nothing was measured")
    failed = node.get("failed_requests", 0)
    if failed != 0 or isinstance(failed, bool):
        raise UnfitError(f"{path}.failed_requests is {failed}: the successful ones are not representative")


def _positive(count: Any) -> bool:
    return isinstance(count, int) and not isinstance(count, bool) and count > 0


def _is_estimate(node: Any) -> bool:
    return isinstance(node, Mapping) and {"value", "samples"} <= node.keys()


def noise_floor(data: Mapping[str, Any], metric: str) -> float | None:
    """The noise floor of `speed.<runtime>.<name>.ratio`, required for a pass; None for other metrics.

    Also at one concurrency of a server, `speed.<runtime>.concurrency.<n>.<name>.ratio`, or one shape of an encoder.
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
    """The looks behind a metric: 1 except for repeated benchmarks. Raises UnfitError for more than `LOOKS`."""
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
    """Paths of all metrics."""
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
    if not abs(found) <= sys.float_info.max:  # neither does a larger integer fit
        raise UnfitError(f"{name} is {found}")
    return found
