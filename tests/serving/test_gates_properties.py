"""What holds for gates on any figures."""

import copy
import math
from collections.abc import Callable
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from numprune.serving.report import GateResult
from tests.serving.judging import Json, check

unhurried = settings(deadline=None)  # how busy the machine is, is not tested

finite = st.floats(min_value=-1e6, max_value=1e6)
near_one = st.floats(min_value=0.5, max_value=1.5)
floors = st.just(0.0) | st.floats(min_value=0, max_value=0.6)
directions = st.sampled_from([("ci95_lower", "min"), ("ci95_upper", "max")])


@st.composite
def estimates(draw: Callable[..., Any]) -> Json:
    bounds = sorted(draw(st.lists(near_one | finite, min_size=4, max_size=4)))
    return {
        "value": draw(st.sampled_from(bounds) | near_one),
        "ci95_lower": bounds[1],
        "ci95_upper": bounds[2],
        "interval95": [bounds[0], bounds[3]],
        "samples": draw(st.integers(min_value=0, max_value=1000)),
        "sampling_unit": "repeat",
    }


def _judge(estimate: Json, floor: float, bound: str, **limit: float) -> GateResult:
    """The gate on the only estimate of a report that has a noise floor."""
    speed = {
        "load": {},
        "warmup": 1,
        "repeats": 4,
        "order": "ABBA",
        "failed_requests": 0,
        "baseline": {},
        "candidate": {},
        "ttft": {"ratio": estimate},
        "noise_floor": {"ttft": {"relative": floor, "neighbours": 2}},
    }
    data = {
        "created": "2026-11-20T12:00:00Z",
        "run_id": "r",
        "identity": {"base": "a" * 64, "candidate": "b" * 64},
        "environment": {"cpu": "A CPU", "cores": 2, "memory_bytes": 1, "platform": "Linux", "valid": True},
        "speed": {"torch": speed},
    }
    return check(data, "speed.torch.ttft.ratio", bound, **limit)


@unhurried
@given(estimates(), floors, directions, near_one | finite)
def test_a_pass_has_its_bound_and_its_value_within_the_limit(
    estimate: Json, floor: float, direction: tuple[str, str], limit: float
) -> None:
    bound, side = direction
    result = _judge(estimate, floor, bound, **{side: limit})
    if result.outcome == "pass":
        sign = 1 if side == "max" else -1
        assert sign * estimate[bound] <= sign * limit
        assert sign * estimate["value"] <= sign * limit
        assert estimate["samples"] >= 2
        assert estimate["interval95"][0] - 1e-2 <= estimate["value"] <= estimate["interval95"][1] + 1e-2


@unhurried
@given(estimates(), floors, directions, near_one | finite, st.floats(min_value=0, max_value=1e6))
def test_a_looser_limit_never_turns_a_pass_into_anything_else(
    estimate: Json, floor: float, direction: tuple[str, str], limit: float, slack: float
) -> None:
    bound, side = direction
    if _judge(estimate, floor, bound, **{side: limit}).outcome == "pass":
        looser = limit + slack if side == "max" else limit - slack
        assert _judge(estimate, floor, bound, **{side: looser}).outcome == "pass"


@unhurried
@given(estimates(), floors, directions, near_one)
def test_a_noise_floor_never_makes_a_pass(
    estimate: Json, floor: float, direction: tuple[str, str], limit: float
) -> None:
    bound, side = direction
    if _judge(estimate, floor, bound, **{side: limit}).outcome == "pass":
        assert _judge(estimate, 0.0, bound, **{side: limit}).outcome == "pass"


@unhurried
@given(estimates(), directions, near_one)
def test_a_wider_interval_never_makes_a_pass(estimate: Json, direction: tuple[str, str], limit: float) -> None:
    bound, side = direction
    wider = copy.deepcopy(estimate)
    wider["ci95_lower"], wider["ci95_upper"] = estimate["interval95"]
    if _judge(wider, 0.0, bound, **{side: limit}).outcome == "pass":
        assert _judge(estimate, 0.0, bound, **{side: limit}).outcome == "pass"


widths = st.floats(min_value=1e-3, max_value=1)
shares = st.floats(min_value=-0.99, max_value=0.99)


@unhurried
@given(near_one, widths, widths, shares, shares, st.integers(2, 1000), directions)
def test_a_limit_nearer_to_the_value_asks_for_more_samples(
    value: float, below: float, above: float, one: float, other: float, samples: int, direction: tuple[str, str]
) -> None:
    bound, side = direction

    def needed(distance: float) -> int:
        limit = value + distance
        estimate = {"value": value, "ci95_lower": value - below, "ci95_upper": value + above, "samples": samples}
        interval = [value - below, value + above]
        result = _judge({**estimate, "interval95": interval, "sampling_unit": "repeat"}, 0.0, bound, **{side: limit})
        assert result.outcome == "inconclusive"
        assert result.samples_needed is not None
        return result.samples_needed

    for width, across, sign in ((above, below, 1), (below, above, -1)):
        # The derivative of P by d > 0 has the sign of d - r (width - across) / 2: nearer to the limit than that, the
        # likelier end is across the value.
        equal = max(width - across, 0) / 2
        near, far = (max(share * width, equal) for share in sorted((abs(one), abs(other))))
        assert needed(sign * near) >= needed(sign * far) > samples


leaves = st.none() | st.booleans() | st.floats() | st.text(max_size=3)
bags = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["value", "samples", "a"]), inner, max_size=3)
    ),
)


@unhurried
@given(bags)
def test_facts_of_any_shape_pass_only_as_numbers(facts: Any) -> None:
    data = {
        "created": "2026-11-20T12:00:00Z",
        "run_id": "r",
        "identity": {"base": "a" * 64, "candidate": "b" * 64},
        "environment": {"cpu": "A CPU", "cores": 2, "memory_bytes": 1, "platform": "Linux", "valid": True},
        "parity": {"torch": {"a": facts}},
    }
    result = check(data, "parity.torch.a", "point", max=1e308)
    number = isinstance(facts, int | float) and not isinstance(facts, bool) and math.isfinite(facts)
    assert result.outcome == ("pass" if number and facts <= 1e308 else "fail")
