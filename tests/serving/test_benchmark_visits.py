"""Absolute latencies: order, statistics, and the state of the machine."""

import pytest

from numprune.errors import EnvironmentInvalid
from numprune.serving.benchmark.load import Load
from numprune.serving.benchmark.scheduler import ThreadTimes
from numprune.serving.benchmark.visits import Runtime, Timed, Visit, check_quiet, drift, order, visit, weighted_medians
from numprune.serving.benchmark.vllm.engines import ahead


class Looks:
    """A worker that answers what it measured: each repeat is slower by a millisecond in the prefill."""

    def __init__(self):
        self.repeats = 0

    def ask(self, what, **_):
        if what != "repeat":
            return {"vocabulary": 8}
        self.repeats += 1
        batch = {"size": 2, "prompt_length": 4, "ttft_ms": float(self.repeats), "itl_ms": [10.0, 10.0, 30.0, 30.0]}
        return {"batches": [batch | {"failed": 0}], "threads": {"ran_s": 1.0, "waited_s": 0.0}}


@pytest.mark.parametrize(
    ("timed", "ms"),
    [
        (Timed("prefill", 2, 4), 3.0),  # the median of the repeats but the first: 2, 3, 4
        (Timed("decode", 2, 4), 30.0),  # of the steps but the first two
        (Timed("request", 2, 4, 5), 3.0 + 80.0),
    ],
)
def test_a_visit_times_a_prefill_steps_or_a_whole_request(tmp_path, timed, ms):
    found = visit(Looks(), Runtime("torch", "cpu", "float32"), tmp_path, {"": timed})
    assert found.ms == {"": ms}
    assert timed.load().output_length == (timed.output or (2 if timed.phase == "prefill" else 11))


def test_every_round_visits_every_model_in_an_order_of_its_own():
    models = [f"model-{index}" for index in range(6)]
    found = order(models, 4, seed=0)
    rounds = [found[start : start + 6] for start in range(0, 24, 6)]
    for number, one in enumerate(rounds):
        assert sorted(one) == [(model, number) for model in models]
    assert len({tuple(model for model, _ in one) for one in rounds}) == 4
    assert order(models, 4, seed=0) == found != order(models, 4, seed=1)


def test_the_interval_is_that_of_the_visits():
    many, one = [12.0, 10.0, 11.0, 30.0, 10.5], [2.0, 2.0, 2.5, 2.0, 2.0]
    value, (low, high) = weighted_medians([many, one], [0.5, -0.5])
    assert value == pytest.approx((11.0 - 2.0) / 2)
    assert 0.5 * (10.0 - 2.5) <= low < value < high <= 0.5 * (30.0 - 2.0)
    assert weighted_medians([[4.0, 4.0, 4.0]], [1.0]) == (4.0, (4.0, 4.0))


def test_a_drift_beyond_chance_is_refused():
    assert drift([1.0, 1.01, 0.99], [1.02, 1.01, 1.0]) == pytest.approx(1.01, abs=1e-3)  # below the limit
    assert drift([1.0, 1.4, 0.8], [1.5, 0.9, 1.3]) > 1.05  # explained by chance
    with pytest.raises(
        EnvironmentInvalid, match=r"too noisy: the same model took 120\.\d% of its time .* measure again"
    ):
        drift([1.0, 1.01, 0.99], [1.2, 1.21, 1.2])


def test_a_worker_that_waits_for_a_cpu_is_noticed():
    visits = [Visit({}, ThreadTimes(ran_s=1, waited_s=waited)) for waited in (0, 2)]
    check_quiet(visits)
    with pytest.raises(EnvironmentInvalid, match="the worker waited for a CPU 90% of its time"):
        check_quiet([*visits, Visit({}, ThreadTimes(ran_s=0, waited_s=16))])


@pytest.mark.parametrize(("batch", "length"), [(1, 64), (8, 512), (128, 256), (3, 700), (256, 128)])
def test_rows_that_are_read_first_have_room_until_the_last_one_is_read(batch: int, length: int) -> None:
    left, steps = [length] * batch, 0
    while left[-1]:
        steps += 1
        room = 2048 - left.count(0)  # of the scheduler, less a token of each row that is generated already
        for row, missing in enumerate(left):
            read = min(missing, room)
            left[row], room = missing - read, room - read
    assert steps <= ahead(Load(prompts=batch, batch_size=batch, prompt_length=length)) <= steps + 2
