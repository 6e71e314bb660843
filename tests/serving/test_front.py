"""The Pareto front of candidates whose figures have intervals."""

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from numprune.serving.front import Estimate, Point, dominates, on_front, point, speed_metric
from numprune.serving.report import Report

SPEED = "speed.onnxruntime.decode_tokens_per_s.ratio"


def at(loss: float, speed: float, size: float, error: float = 0.0) -> Point:
    first, second = (Estimate(value, value - error, value + error) for value in (loss, speed))
    return Point(first, second, Estimate(size, size, size))


def test_a_candidate_that_is_worse_in_something_and_better_in_nothing_is_not_on_the_front() -> None:
    points = [at(0.1, 1.2, 0.8), at(0.2, 1.2, 0.8), at(0.1, 1.1, 0.8), at(0.1, 1.2, 0.9), at(0.3, 1.3, 0.7)]
    assert on_front(points) == [True, False, False, False, True]


@pytest.mark.parametrize(("loss", "stays"), [(0.14, True), (0.16, False)])
def test_what_is_worse_within_the_intervals_stays(loss: float, stays: bool) -> None:
    assert on_front([at(0.1, 1.2, 0.8, error=0.025), at(loss, 1.2, 0.8, error=0.025)]) == [True, stays]


def test_what_is_better_in_something_even_within_the_intervals_stays() -> None:
    assert on_front([at(0.1, 1.2, 0.8, error=0.05), at(0.5, 1.21, 0.8, error=0.05)]) == [True, True]


def test_equals_are_both_on_the_front_and_what_was_not_measured_is_not() -> None:
    assert on_front([at(0.1, 1.2, 0.8), None, at(0.1, 1.2, 0.8)]) == [True, False, True]


values = st.floats(0.01, 2)


@given(st.lists(st.builds(at, values, values, values, st.floats(0, 0.3)), min_size=1, max_size=12))
def test_the_front_is_what_nothing_on_it_dominates(points: list[Point]) -> None:
    on = on_front(points)
    front = [one for one, is_on in zip(points, on, strict=True) if is_on]
    assert front
    for one, is_on in zip(points, on, strict=True):
        assert not dominates(one, one)
        assert is_on != any(dominates(other, one) for other in points)


def test_figures_of_a_report(report_json: dict[str, Any]) -> None:
    found = point(Report.model_validate(report_json), SPEED)
    assert found is not None
    ratio = report_json["speed"]["onnxruntime"]["decode_tokens_per_s"]["ratio"]
    assert (found.speed.value, found.speed.low, found.speed.high) == (ratio["value"], *ratio["interval95"])
    assert found.loss.value == 0.05
    assert found.bytes == Estimate(0.75, 0.75, 0.75)


def test_an_invalid_environment_or_a_missing_figure_gives_no_point(report_json: dict[str, Any]) -> None:
    without = copy.deepcopy(report_json)
    del without["sizes"]["weight_bytes"]
    assert point(Report.model_validate(without), SPEED) is None
    assert point(Report.model_validate(report_json), "speed.torch.decode_tokens_per_s.ratio") is None
    report_json["environment"] |= {"valid": False, "reasons": ["the GPU is hot"]}
    assert point(Report.model_validate(report_json), SPEED) is None


@pytest.mark.parametrize(
    ("runtimes", "task", "metric"),
    [
        (["torch", "onnxruntime"], "causal-lm", SPEED),
        (["torch", "vllm"], "causal-lm", "speed.vllm.output_tokens_per_s.ratio"),
        (["torch"], "embedding", "speed.torch.samples_per_s.ratio"),
    ],
)
def test_the_speed_is_that_of_the_runtime_nearest_to_production(runtimes: list[str], task: str, metric: str) -> None:
    assert speed_metric(runtimes, task) == metric
