"""A killed training of masks ends like an undisturbed one."""

from pathlib import Path
from typing import Any

import pytest
import torch

from numprune.errors import IntegrityError
from numprune.learning import Learned, Variant, learn, training
from numprune.recovery.state import TrainingState
from tests.conftest import build_tiny
from tests.numprune.learning.test_vib import LENGTH, OPTIONS, ROWS, SELECTION

TOKENS = 20 * 32 * LENGTH  # 20 steps; the target falls in the first 8


class Killed(BaseException):
    pass


def learned(variant: Variant, state: TrainingState) -> Learned:
    return learn(build_tiny(), ROWS, SELECTION, OPTIONS, variant, TOKENS, learning_rate=1e-3, state=state)


@pytest.mark.slow
@pytest.mark.parametrize("killed_at", [5, 15])  # before and after the first masks are judged
@pytest.mark.parametrize("variant", ["fast", "faster"])
def test_a_killed_training_ends_like_an_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: Variant, killed_at: int
) -> None:
    wanted = learned(variant, TrainingState(tmp_path / "a", "x"))
    state, step = TrainingState(tmp_path / "b", "x"), training.Training._step

    def dying(self: Any, number: int) -> float:
        if number == killed_at:
            raise Killed
        return step(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(training.Training, "_step", dying)
        with pytest.raises(Killed):
            learned(variant, state)
    taken = []

    def counted(self: Any, number: int) -> float:
        taken.append(number)
        return step(self, number)

    monkeypatch.setattr(training.Training, "_step", counted)
    found = learned(variant, state)
    assert taken == list(range(killed_at - 1, 20))  # states are saved after each second step
    assert found.plan == wanted.plan
    assert found.record.best_step == wanted.record.best_step
    assert (found.record.divergence, found.record.kept) == (wanted.record.divergence, wanted.record.kept)
    assert (found.model is None) == (wanted.model is None) == (variant == "faster")
    if found.model is not None and wanted.model is not None:
        others = wanted.model.state_dict()
        assert all(torch.equal(value, others[name]) for name, value in found.model.state_dict().items())


@pytest.mark.slow
def test_the_best_masks_may_be_those_of_a_step_before_the_kill(tmp_path: Path) -> None:
    """What was saved last is all that is needed, however often the finished training is asked for again."""
    state = TrainingState(tmp_path / "a", "x")
    wanted = learned("faster", state)
    again = learned("faster", state)
    assert (again.plan, again.record) == (wanted.plan, wanted.record)


def test_a_loss_that_is_not_finite_ends_the_training(tmp_path: Path) -> None:
    said = r"training diverged at step \d+ of 20: the loss is not finite; choose a learning rate below 1e\+30"
    with pytest.raises(IntegrityError, match=said):
        learn(build_tiny(), ROWS, SELECTION, OPTIONS, "fast", TOKENS, learning_rate=1e30)
