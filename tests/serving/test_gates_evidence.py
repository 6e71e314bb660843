"""Every way in which a gate could pass wrongly."""

import math
from typing import Any

import pytest

from numprune.serving.gates import Gate
from tests.serving.judging import DECODE, NLL, Json, check


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("quality", None),
        ("quality.tokens", 0),
        ("quality.documents", 0),
        (f"{NLL}.samples", 0),
        (f"{NLL}.samples", 1),
        (f"{NLL}.value", None),
        (f"{NLL}.value", math.nan),
        (f"{NLL}.value", -math.inf),
        (f"{NLL}.ci95_lower", math.nan),
        (f"{NLL}.ci95_upper", -math.inf),
        (f"{NLL}.interval95", [math.nan, 0.07]),
        (f"{NLL}.value", 0.5),  # outside its own interval
        (f"{NLL}.value", -0.5),
    ],
)
def test_an_estimate_without_enough_samples_fails(report_json: Json, put: Any, path: str, value: Any) -> None:
    limits = {"bound": "ci95_upper", "max": 1e9}
    assert check(report_json, NLL, **limits).outcome == "pass"
    result = check(put(report_json, path, value), NLL, **limits)
    assert result.outcome == "fail"
    assert result.samples_needed is None


@pytest.mark.parametrize(
    ("metric", "bound", "why"),
    [
        ("quality.no_such_metric", "point", "has no"),
        ("nothing.at.all", "point", "has no"),
        ("quality.tokens.more", "point", "has no"),
        ("quality", None, None),
        ("quality.baseline", "point", "dict"),
        ("run_id.x", "point", "has no"),
        ("identity.base", "point", "str"),
        ("environment.valid", "point", "bool"),
        ("environment.load_average", "point", "list"),
        ("parity.onnxruntime.passed", "point", "bool"),
        ("parity.onnxruntime.text", "point", "str"),
        ("parity.onnxruntime.nan", "point", "not measured"),
        ("parity.torch.maximum_error", "point", "has no"),
        ("speed.onnxruntime.itl.ratio", "point", "has no"),
        ("speed.onnxruntime.baseline.ttft_ms.p99", "point", "not measured"),
        ("sizes.parameters.ratio", "ci95_upper", "plain number"),
        (f"{NLL}.value", "point", "points inside an estimate"),
        (f"{NLL}.ci95_upper", "point", "points inside an estimate"),
        ("verdict.gates", "point", "has no"),
    ],
)
def test_a_value_that_is_not_a_number_fails(report_json: Json, metric: str, bound: str | None, why: str | None) -> None:
    report_json["parity"]["onnxruntime"] |= {"passed": True, "text": "0.0", "nan": math.nan}
    if bound is None:
        with pytest.raises(ValueError):  # a section alone is no path
            Gate(metric=metric, bound="point", max=1e9)
        return
    result = check(report_json, metric, bound, max=1e9)
    assert result.outcome == "fail"
    assert why is not None
    assert why in result.reason


@pytest.mark.parametrize("samples", [1 << 53, 10**400])
def test_impossible_sample_counts_fail(report_json: Json, put: Any, samples: int) -> None:
    result = check(put(report_json, f"{NLL}.samples", samples), NLL, "ci95_upper", max=1e9)
    assert result.outcome == "fail"
    assert "an impossible number of samples" in result.reason


def test_an_infinite_count_fails(report_json: Json, put: Any) -> None:
    put(report_json, "quality.tokens", 10**400)
    assert check(report_json, "quality.tokens", "point", min=1.0).outcome == "fail"


def test_an_infinite_interval_is_inconclusive(report_json: Json, put: Any) -> None:
    endless = {"value": 0.0, "ci95_lower": -1e308, "ci95_upper": 1e308, "interval95": [-1.7e308, 1.7e308]}
    put(report_json, NLL, {**report_json["quality"]["loss_delta"], **endless})
    result = check(report_json, NLL, "ci95_upper", max=0.1)
    assert (result.outcome, result.samples_needed) == ("inconclusive", None)
    assert "no number of samples would settle it" in result.reason


def test_percentiles_without_samples_fail(report_json: Json, put: Any) -> None:
    metric = "speed.onnxruntime.candidate.ttft_ms.p50"
    assert check(report_json, metric, "point", max=100).outcome == "pass"
    put(report_json, "speed.onnxruntime.candidate.ttft_ms", {"p50": 1.0, "samples": 0})
    assert check(report_json, metric, "point", max=100).outcome == "fail"


@pytest.mark.parametrize(("path", "value"), [("failed_requests", 1), ("repeats", 0)])
def test_speed_after_failed_requests_fails(report_json: Json, put: Any, path: str, value: int) -> None:
    put(report_json, f"speed.onnxruntime.{path}", value)
    result = check(report_json, DECODE, "ci95_lower", min=0.1)
    assert result.outcome == "fail"
    assert path in result.reason


def test_arbitrary_facts_cannot_pose_as_an_estimate(report_json: Json) -> None:
    report_json["parity"]["onnxruntime"]["fake"] = {"value": 0.0, "samples": 9}
    report_json["parity"]["onnxruntime"]["turned"] = {
        **report_json["quality"]["loss_delta"],
        "ci95_upper": -1.0,
    }
    for name in ("fake", "turned"):
        assert check(report_json, f"parity.onnxruntime.{name}", "ci95_upper", max=1.0).outcome == "fail"
        assert check(report_json, f"parity.onnxruntime.{name}", "point", max=1.0).outcome == "fail"


def test_an_upper_bound_below_its_own_value_does_not_help(report_json: Json, put: Any) -> None:
    skewed = {"value": 0.05, "ci95_lower": 0.01, "ci95_upper": 0.045, "interval95": [0.0, 0.06]}
    put(report_json, NLL, {**report_json["quality"]["loss_delta"], **skewed})
    assert check(report_json, NLL, "ci95_upper", max=0.047).outcome != "pass"


@pytest.mark.parametrize(
    ("metric", "suggestion"),
    [
        ("speed.decode_tokens_per_s.ratio", DECODE),  # the runtime is forgotten
        ("quality.loss_delte", NLL),
        ("size.parameters.ratio", "sizes.parameters.ratio"),
    ],
)
def test_an_unknown_metric_gets_a_suggestion(report_json: Json, metric: str, suggestion: str) -> None:
    result = check(report_json, metric, "point", max=1.0)
    assert result.outcome == "fail"
    assert f"did you mean {suggestion}" in result.reason
