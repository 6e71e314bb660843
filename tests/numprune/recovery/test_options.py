"""Steps, learning rates and the order of rows."""

from itertools import pairwise

import pytest

from numprune.recovery.options import RecoveryOptions, RowOrder, learning_rate_factor, measured_after


def test_tokens_are_whole_steps() -> None:
    assert RecoveryOptions(tokens=1_000_000).steps(512) == 244
    assert RecoveryOptions(tokens=1).steps(512) == 1


def test_the_default_learning_rate_follows_from_the_width() -> None:
    assert [RecoveryOptions().rate(width) for width in (256, 4096)] == pytest.approx([5e-4, 3.125e-5])
    assert RecoveryOptions(learning_rate=0.0).rate(256) == 0.0


def test_the_learning_rate_rises_for_a_twentieth_and_falls_to_a_tenth() -> None:
    factors = [learning_rate_factor(step, 200) for step in range(200)]
    assert factors[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert factors[10] == 1.0
    assert all(before > after for before, after in pairwise(factors[10:]))
    assert factors[105] == pytest.approx(0.55, abs=0.005)  # halfway down the cosine
    assert factors[-1] == pytest.approx(0.1)
    assert learning_rate_factor(0, 1) == 1.0


def test_measurements_are_spread_and_the_last_is_at_the_end() -> None:
    assert measured_after(200) == [20, 40, 60, 80, 100, 120, 140, 160, 180, 200]
    assert measured_after(3) == [1, 2, 3]
    assert measured_after(1) == [1]


def test_every_row_comes_once_before_any_comes_again() -> None:
    order = RowOrder(7, 3, seed=5)
    drawn = [row for step in range(7) for row in order.batch(step)]
    epochs = [drawn[start : start + 7] for start in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_the_order_depends_on_seed_and_step_alone() -> None:
    order = RowOrder(50, 4, seed=5)
    ahead = [order.batch(step) for step in range(30)]
    assert [RowOrder(50, 4, seed=5).batch(step) for step in range(30)] == ahead
    assert RowOrder(50, 4, seed=6).batch(0) != ahead[0]
