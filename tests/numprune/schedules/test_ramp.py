"""The cubic schedule, and how the loss delays it."""

import pytest

from numprune.errors import InputError
from numprune.schedules.ramp import Pace, Ramp


def test_units_go_by_the_cubic_schedule():
    ramp = Ramp.of(steps=100, begin=0.1, end=0.5, every=10)
    assert ramp == Ramp(first=10, every=10, times=5)
    assert [step for step in range(101) if ramp.includes(step)] == [10, 20, 30, 40, 50, 60, 70, 80, 90, 100]
    assert ramp.share(0) == 0
    assert ramp.share(5) == 1
    assert ramp.share(1) == pytest.approx(1 - 0.8**3)
    assert ramp.share(3) == pytest.approx(1 - 0.4**3)


def test_a_training_that_is_too_short_is_refused():
    with pytest.raises(InputError, match=r"every is 20, and from begin=0.1 to end=0.7 a training of 30 steps has 18;"):
        Ramp.of(steps=30, begin=0.1, end=0.7, every=20)


def test_the_loss_decides_whether_units_go_wait_or_come_back():
    ramp, pace = Ramp(first=10, every=10, times=3), Pace()
    # loss, the step that follows: the lowest loss so far is 2.0, then 1.0
    for loss, done in ((2.0, 1), (2.09, 2), (2.15, 2), (2.25, 1), (1.0, 2), (1.15, 2), (1.3, 1), (1.05, 2), (1.0, 3)):
        pace.next(ramp, loss, tolerance=0.1)
        assert pace.done == done, loss
    pace.next(ramp, 9.0, tolerance=0.1)
    assert pace.done == 3  # once the ratio is reached it stays


def test_nothing_comes_back_that_never_went():
    pace = Pace(done=0, lowest=1.0)
    pace.next(Ramp(first=10, every=10, times=3), 5.0, tolerance=0.1)
    assert pace.done == 0
