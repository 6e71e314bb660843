"""Gates on sound evidence: bounds, looks, candidates, noise floors, and the verdict of several."""

import math
from typing import Any

import pytest

from numprune.serving.gates import EXIT_CODES, Gate, Policy, exit_code, judge, next_look
from numprune.serving.power import power, student
from numprune.serving.report import GateResult, Report
from tests.serving.judging import DECODE, NLL, Json, check

# --- verdicts on sound evidence --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "outcome"),
    [(0.06, "pass"), (0.0601, "pass"), (0.0599, "inconclusive"), (0.04, "inconclusive"), (0.0399, "fail")],
)
def test_a_maximum_uses_the_upper_bound(report_json: Json, put: Any, limit: float, outcome: str) -> None:
    put(report_json, NLL, {**report_json["quality"]["loss_delta"], "ci95_lower": 0.04, "ci95_upper": 0.06})
    result = check(report_json, NLL, "ci95_upper", max=limit)
    assert result.outcome == outcome, result.reason
    assert result.value == 0.05
    assert result.interval == (0.04, 0.06)


@pytest.mark.parametrize(
    ("limit", "outcome"), [(1.14, "pass"), (1.16, "inconclusive"), (1.24, "inconclusive"), (1.26, "fail")]
)
def test_a_minimum_uses_the_lower_bound(report_json: Json, limit: float, outcome: str) -> None:
    assert check(report_json, DECODE, "ci95_lower", min=limit).outcome == outcome


@pytest.mark.parametrize("looks", [1, 2, 3])
def test_a_repeated_speed_measurement_uses_wider_bounds(report_json: Json, looks: int) -> None:
    report_json["speed"]["onnxruntime"]["looks"] = looks
    ratio = report_json["speed"]["onnxruntime"]["decode_tokens_per_s"]["ratio"]
    outer, inner = ratio["interval95"][0], ratio["ci95_lower"]
    assert outer < inner
    between = check(report_json, DECODE, "ci95_lower", min=(outer + inner) / 2)
    assert between.outcome == ("pass" if looks == 1 else "inconclusive")
    assert between.interval is not None
    assert between.interval[0] == (inner if looks == 1 else outer)
    assert (f"look {looks} of 3, judged by 97.5 % bounds" in between.reason) == (looks > 1)
    assert check(report_json, DECODE, "ci95_lower", min=outer - 1e-6).outcome == "pass"
    nll = report_json["quality"]["loss_delta"]["ci95_upper"]
    assert check(report_json, NLL, "ci95_upper", max=nll).outcome == "pass"  # quality is judged as ever


@pytest.mark.parametrize(("candidates", "looks"), [(2, 1), (12, 1), (12, 2)])
def test_one_of_several_candidates_is_judged_by_wider_bounds(report_json: Json, candidates: int, looks: int) -> None:
    """Bonferroni: a K times smaller error, by Student's quantiles; for ratios in the logarithm."""
    report_json["speed"]["onnxruntime"]["looks"] = looks
    alone = check(report_json, NLL, "ci95_upper", max=0.1).interval
    report_json["candidates"] = candidates
    loss, ratio = check(report_json, NLL, "ci95_upper", max=0.1), check(report_json, DECODE, "ci95_lower", min=0.5)
    error, error_of_look = 0.05 / candidates, (0.05 if looks == 1 else 0.025) / candidates
    delta, speed = report_json["quality"]["loss_delta"], report_json["speed"]["onnxruntime"]["decode_tokens_per_s"]
    wider = student(delta["samples"], 1 - error) / student(delta["samples"], 0.975)
    assert loss.interval == pytest.approx(
        [0.05 + wider * (end - 0.05) for end in delta["interval95"]], rel=1e-12, abs=1e-12
    )
    assert alone is not None
    assert loss.interval is not None
    assert loss.interval[0] < alone[0] < alone[1] < loss.interval[1]
    speed = speed["ratio"]
    wider = student(speed["samples"], 1 - error_of_look) / student(speed["samples"], 0.975)
    assert ratio.interval is not None
    for end, bound in zip(speed["interval95"], ratio.interval, strict=True):
        assert math.log(bound / speed["value"]) == pytest.approx(wider * math.log(end / speed["value"]))
    assert f"one of {candidates} candidates, judged by {100 * (1 - error):.6g} % bounds" in loss.reason
    assert check(report_json, "sizes.parameters.ratio", "point", max=0.75).reason == "within the limit"


def test_bounds_of_several_candidates_are_numbers_for_any_interval(report_json: Json) -> None:
    """A report may come from anywhere: this one's lower end is 0 as a share of its value."""
    ratio = report_json["speed"]["onnxruntime"]["decode_tokens_per_s"]["ratio"]
    ratio |= {"value": 1e200, "ci95_lower": 1e-200, "ci95_upper": 1e300, "interval95": [1e-200, 1e300]}
    report_json["candidates"] = 12
    assert check(report_json, DECODE, "ci95_lower", min=0.5).outcome == "fail"


def test_the_number_of_candidates_cannot_be_altered_after_the_verdict(report_json: Json) -> None:
    report = Report.model_validate({**report_json, "candidates": 12})
    policy = Policy(gates=(Gate(metric=NLL, bound="ci95_upper", max=0.1),))
    data = report.judged(judge(report, policy)).to_json()
    with pytest.raises(ValueError, match="altered after its verdict"):
        Report.model_validate({**data, "candidates": 1})


@pytest.mark.parametrize("looks", [0, 4, 100])
def test_a_speed_measured_too_often_fails(report_json: Json, looks: int) -> None:
    report_json["speed"]["onnxruntime"]["looks"] = looks
    result = check(report_json, DECODE, "ci95_lower", min=0.1)
    assert result.outcome == "fail"
    assert f"speed.onnxruntime.looks is {looks}" in result.reason


def test_the_power_of_a_later_look_is_that_of_its_bounds(report_json: Json) -> None:
    powers = []
    for looks in (1, 2):
        report_json["speed"]["onnxruntime"]["looks"] = looks
        result = check(report_json, DECODE, "ci95_lower", min=0.9)
        powers.append(result.power)
    assert 0 < powers[1] < powers[0]


@pytest.mark.parametrize(
    ("gates", "looks", "runtimes"),
    [
        ([(DECODE, "min", 1.2)], 1, ["onnxruntime"]),
        ([(DECODE, "min", 1.2)], 2, ["onnxruntime"]),
        ([(DECODE, "min", 1.2)], 3, []),  # it has had its looks
        ([(DECODE, "min", 1.0)], 1, []),  # it passes
        ([(DECODE, "min", 1.2), (NLL, "max", 0.2)], 1, ["onnxruntime"]),
        ([(DECODE, "min", 1.2), (NLL, "max", 0.05)], 1, []),  # quality stays open, whatever is timed
        ([(DECODE, "min", 1.2), (NLL, "max", 0.001)], 1, []),  # it fails
    ],
)
def test_another_look_is_suggested_only_if_it_can_settle_the_verdict(
    report_json: Json, gates: list[tuple[str, str, float]], looks: int, runtimes: list[str]
) -> None:
    report_json["speed"]["onnxruntime"]["looks"] = looks
    bounds = {"min": "ci95_lower", "max": "ci95_upper"}
    rules = tuple(Gate.model_validate({"metric": m, "bound": bounds[side], side: limit}) for m, side, limit in gates)
    report = Report.model_validate({**report_json, "verdict": None})
    assert next_look(report) == []  # not judged
    assert next_look(report.judged(judge(report, Policy(gates=rules)))) == runtimes


@pytest.mark.parametrize(("limit", "outcome"), [(0.75, "pass"), (0.7499, "fail")])
def test_a_plain_number_has_no_interval(report_json: Json, limit: float, outcome: str) -> None:
    assert check(report_json, "sizes.parameters.ratio", "point", max=limit).outcome == outcome
    assert check(report_json, "sizes.parameters.candidate", "point", min=750).outcome == "pass"


def test_the_point_of_an_estimate_ignores_its_interval(report_json: Json) -> None:
    assert check(report_json, NLL, "point", max=0.0501).outcome == "pass"
    assert check(report_json, NLL, "point", max=0.0499).outcome == "fail"


def test_inconclusive_gives_the_samples_needed(report_json: Json) -> None:
    # 40 samples leave a half-width of 0.01.
    needed = []
    for limit in (0.05, 0.052, 0.055, 0.059):
        result = check(report_json, NLL, "ci95_upper", max=limit)
        assert result.outcome == "inconclusive"
        assert result.samples_needed is not None
        assert f"about {result.samples_needed} samples would settle it" in result.reason
        needed.append(result.samples_needed)
    assert needed == sorted(needed, reverse=True)
    assert 41 < needed[-1] < 40 * 10 < needed[0] < 40 * 42
    below = check(report_json, NLL, "ci95_upper", max=0.045)  # as far from the value on its other side
    assert below.samples_needed == needed[2]


def test_a_gate_reports_its_power(report_json: Json) -> None:
    """The chance that a candidate equal to the baseline passes: an NLL difference of 0, a ratio of 1."""
    error = 0.01 / student(40)  # 40 documents leave a half-width of 0.01
    for limit in (0.01, 0.015, 0.03):
        assert check(report_json, NLL, "ci95_upper", max=limit).power == pytest.approx(power(40, error, limit))
    assert check(report_json, NLL, "ci95_upper", max=0.1).power == pytest.approx(1)
    assert check(report_json, "quality.perplexity_ratio", "ci95_upper", max=1.015).power == pytest.approx(
        power(40, error, 0.015)
    )
    assert check(report_json, DECODE, "ci95_lower", min=0.9).power == pytest.approx(power(10, 0.05 / student(10), 0.1))
    assert check(report_json, DECODE, "ci95_lower", min=0.98).power < 0.05  # inside the noise floor
    for metric, bound, limit in [
        (NLL, "ci95_upper", {"max": -0.01}),  # an equal candidate should not pass
        (DECODE, "ci95_lower", {"min": 1.1}),
        (NLL, "point", {"max": 0.1}),
        ("sizes.parameters.ratio", "point", {"max": 1.1}),
    ]:
        assert check(report_json, metric, bound, **limit).power is None


def test_inconclusive_reports_low_power(report_json: Json, put: Any) -> None:
    wide = {"value": 0.0, "ci95_lower": -0.1, "ci95_upper": 0.1, "interval95": [-0.12, 0.12]}
    put(report_json, NLL, {**report_json["quality"]["loss_delta"], **wide})
    assert (
        "with 40 a candidate equal to the baseline passes 2" in check(report_json, NLL, "ci95_upper", max=0.06).reason
    )
    assert "equal to the baseline" not in check(report_json, NLL, "ci95_upper", max=-0.06).reason


def test_verdicts_over_windows_are_limited_to_their_text(report_json: Json, put: Any) -> None:
    assert "text only" not in check(report_json, NLL, "ci95_upper", max=0.1).reason
    put(report_json, f"{NLL}.sampling_unit", "window")
    result = check(report_json, NLL, "ci95_upper", max=0.1)
    assert result.outcome == "pass"
    assert "it holds for this text only" in result.reason


# --- the noise floor -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "lower", "outcome"),
    [
        (1.02, 1.025, "inconclusive"),  # tighter than 1 ± 0.03, and the result within it
        (1.02, 1.031, "pass"),  # tighter, but the result stands clear
        (1.05, 1.06, "pass"),
        (0.98, 0.99, "inconclusive"),
        (0.95, 0.96, "pass"),  # a limit that the noise cannot reach
        (1.02, 0.5, "inconclusive"),
    ],
)
def test_a_limit_inside_the_noise_floor_is_reported(
    report_json: Json, put: Any, limit: float, lower: float, outcome: str
) -> None:
    ratio = {"value": 1.2, "ci95_lower": lower, "ci95_upper": 1.4, "interval95": [0.4, 1.5]}
    put(report_json, DECODE, {**report_json["speed"]["onnxruntime"]["decode_tokens_per_s"]["ratio"], **ratio})
    result = check(report_json, DECODE, "ci95_lower", min=limit)
    assert result.outcome == outcome, result.reason
    assert result.noise_floor == 0.03
    assert ("tighter than the noise floor" in result.reason) == (abs(limit - 1) < 0.03)


def test_a_maximum_respects_the_noise_floor(report_json: Json) -> None:
    report_json["speed"]["onnxruntime"]["noise_floor"]["ttft"] = {"relative": 0.25, "neighbours": 5}
    result = check(report_json, "speed.onnxruntime.ttft.ratio", "ci95_upper", max=0.9)  # upper bound 0.81
    assert result.outcome == "inconclusive"
    report_json["speed"]["onnxruntime"]["noise_floor"]["ttft"]["relative"] = 0.15
    assert check(report_json, "speed.onnxruntime.ttft.ratio", "ci95_upper", max=0.9).outcome == "pass"


@pytest.mark.parametrize(
    "floor",
    [
        {"relative": math.nan, "neighbours": 5},
        {"relative": None, "neighbours": 5},
        {"relative": -0.1, "neighbours": 5},
        {"relative": 0.0, "neighbours": 0},
    ],
)
def test_a_noise_floor_without_enough_samples_fails(report_json: Json, floor: Json) -> None:
    report_json["speed"]["onnxruntime"]["noise_floor"]["decode_tokens_per_s"] = floor
    assert check(report_json, DECODE, "ci95_lower", min=0.5).outcome == "fail"
    del report_json["speed"]["onnxruntime"]["noise_floor"]["decode_tokens_per_s"]
    assert "noise_floor" in check(report_json, DECODE, "ci95_lower", min=0.5).reason


def test_inside_the_noise_floor_the_repeats_needed_are_given(report_json: Json, put: Any) -> None:
    def judged(lower: float, limit: float) -> GateResult:
        ratio = {"value": 1.2, "ci95_lower": lower, "ci95_upper": 1.4, "interval95": [0.9, 1.5]}
        put(report_json, DECODE, {**report_json["speed"]["onnxruntime"]["decode_tokens_per_s"]["ratio"], **ratio})
        return check(report_json, DECODE, "ci95_lower", min=limit)

    # The floor of 0.03 from 10 repeats falls with their square root: for 0.02 it takes 22.5.
    within = judged(1.025, 1.02)
    assert (within.outcome, within.samples_needed) == ("inconclusive", 23)
    assert "run about 23 repeats" in within.reason
    straddling = judged(1.01, 1.02)
    assert straddling.samples_needed is not None
    assert straddling.samples_needed >= 23
    at_one = judged(1.001, 1.0)
    assert (at_one.outcome, at_one.samples_needed) == ("inconclusive", None)
    assert "repeats" not in at_one.reason


# --- the verdict -----------------------------------------------------------------------------------


def _policy(*limits: float) -> Policy:
    return Policy(gates=tuple(Gate(metric=NLL, bound="ci95_upper", max=limit) for limit in limits))


@pytest.mark.parametrize(
    ("limits", "outcome", "code"),
    [
        ((0.1, 0.2), "pass", 0),
        ((0.1, 0.05), "inconclusive", 3),
        ((0.05, 0.01, 0.1), "fail", 2),
    ],
)
def test_one_failure_fails_and_one_inconclusive_gate_is_inconclusive(
    report_json: Json, limits: tuple[float, ...], outcome: str, code: int
) -> None:
    verdict = judge(Report.model_validate(report_json), _policy(*limits))
    assert verdict.outcome == outcome
    assert exit_code(verdict) == code
    judged = Report.model_validate(report_json).judged(verdict)
    assert judged.verdict == verdict
    assert judge(judged, _policy(*limits)) == verdict  # the verdict in the report does not count


@pytest.mark.parametrize("limit", [0.1, 0.05, 0.01])
def test_nothing_is_judged_in_an_invalid_environment(report_json: Json, limit: float) -> None:
    report_json["environment"] |= {"valid": False, "reasons": ["the GPU is throttled"]}
    report = Report.model_validate(report_json)
    verdict = judge(report, _policy(limit))
    assert verdict.outcome == "invalid environment"
    assert exit_code(verdict) == 4
    assert report.judged(verdict).verdict == verdict


def test_the_exit_codes_are_the_documented_ones() -> None:
    assert dict(EXIT_CODES) == {"pass": 0, "fail": 2, "inconclusive": 3, "invalid environment": 4}
