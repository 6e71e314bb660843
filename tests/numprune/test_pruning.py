import pytest
import torch

from numprune.errors import InputError
from numprune.layers import ModelLayers
from numprune.pruning import PruneOptions, dense_moments, prune
from numprune.target import Target
from tests.conftest import build_tiny

ROWS = torch.randint(0, 256, (16, 32), generator=torch.Generator().manual_seed(0))


def output_error(options):
    with torch.no_grad():
        dense = build_tiny().model(ROWS).last_hidden_state
        return float((prune(build_tiny(), ROWS, options).model.model(ROWS).last_hidden_state - dense).square().mean())


@pytest.mark.parametrize("criterion", ["random", "wanda", "numerical", "obs"])
def test_compensation_brings_the_outputs_closer_to_the_dense_model_s(criterion):
    none, oneshot, sequential = (
        output_error(PruneOptions(0.4, criterion=criterion, compensation=name, target=Target(align=1)))
        for name in ("none", "oneshot", "sequential")
    )
    assert oneshot < none
    assert sequential < oneshot


def test_batch_size_does_not_change_the_result():
    plans = [prune(build_tiny(), ROWS, PruneOptions(0.4, target=Target(align=1), batch_size=size)) for size in (3, 16)]
    assert plans[0].plan == plans[1].plan
    for a, b in zip(plans[0].model.parameters(), plans[1].model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_ratio_zero_leaves_the_model_as_it_is():
    result = prune(build_tiny(), ROWS, PruneOptions(0.0))
    assert result.prunable_ratio_removed == 0
    for a, b in zip(result.model.parameters(), build_tiny().parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_plan_records_how_it_came_about():
    plan = prune(build_tiny(), ROWS, PruneOptions(0.3, criterion="obs", seed=7)).plan
    assert (plan.family, plan.criterion, plan.ratio, plan.seed) == ("llama", "obs", 0.3, 7)
    assert (plan.calibration.rows, plan.calibration.sequence_length) == (16, 32)
    assert len(plan.calibration.digest) == 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (PruneOptions(0.3, criterion="magic"), "criterion is 'magic'; it must be one of random, magnitude"),
        (PruneOptions(0.3, allocation="error"), "allocation is 'error'; it must be one of uniform, global"),
        (PruneOptions(0.3, compensation="some"), "compensation is 'some'"),
        (PruneOptions(0.3, damping=-1), "damping is -1"),
        (PruneOptions(0.999), "at most"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        prune(build_tiny(), ROWS, options)


def test_too_few_calibration_tokens_warn(caplog):
    prune(build_tiny(), ROWS[:2], PruneOptions(0.3))
    assert "64 calibration tokens are fewer than four times the widest block's 96 channels" in caplog.text


@pytest.mark.parametrize(
    ("criterion", "allocation", "compensation"),
    [
        ("wanda", "uniform", "none"),
        ("flap", "global", "bias"),
        ("obs", "uniform", "oneshot"),
        ("flap", "global", "sequential"),
    ],
)
def test_moments_that_are_known_give_what_collecting_them_gives(criterion, allocation, compensation):
    options = PruneOptions(0.4, criterion, allocation, compensation, target=Target(align=1))
    known = dict(dense_moments(ModelLayers(build_tiny()), ROWS))
    collected, given = prune(build_tiny(), ROWS, options), prune(build_tiny(), ROWS, options, known)
    assert given.plan == collected.plan
    for a, b in zip(given.model.parameters(), collected.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_known_moments_spare_the_walk():
    """With them the model's own inputs do not matter: moments of other rows give those rows' result."""
    options = PruneOptions(0.4, "obs", "uniform", "oneshot", target=Target(align=1))
    other = ROWS.flip(1)
    known = dict(dense_moments(ModelLayers(build_tiny()), other))
    given, expected = prune(build_tiny(), ROWS, options, known), prune(build_tiny(), other, options)
    for a, b in zip(given.model.parameters(), expected.model.parameters(), strict=True):
        assert torch.equal(a, b)
