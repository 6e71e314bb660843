"""Scores of units: movement by the weights' own gradients, magnitude as in the criterion."""

import pytest
import torch

from numprune.anatomy import read_anatomy
from numprune.calibration import consumer_weight
from numprune.criteria import CRITERIA, BlockView
from numprune.errors import InputError
from numprune.schedules.scores import Magnitude, Movement, magnitude
from numprune.schedules.units import Units
from tests.conftest import build_tiny

ROWS = torch.randint(0, 256, (4, 12), generator=torch.Generator().manual_seed(0))


def build(family="llama", *, movement=True, **overrides):
    model = build_tiny(family, **overrides)
    anatomy = read_anatomy(model.config)
    layers = model.get_submodule(anatomy.layers_path)
    units = Units(layers, anatomy.blocks, gradients=movement)
    return model, anatomy, layers, units, Movement(units) if movement else Magnitude(units)


def loss_of(model, rows=ROWS):
    return model(input_ids=rows, labels=rows, use_cache=False).loss


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_movement_is_minus_the_weights_times_their_gradients(family):
    model, anatomy, layers, units, movement = build(family)
    units.attach()
    for rows in ROWS.split(2):  # micro-batches of one step
        loss_of(model, rows).backward()
    movement.collect(step=1, target=0.0)
    found = units.by_block(movement.scores(step=1))
    for block in anatomy.blocks:
        layer = layers[block.layer]
        gradient = layer.get_parameter(block.reader.tensor).grad
        gradient = gradient if block.reader.dim == 1 else gradient.T
        wanted = -(consumer_weight(layer, block) * gradient).sum(0).view(block.units, -1).sum(1)
        torch.testing.assert_close(found[block.name], wanted.detach(), rtol=1e-3, atol=1e-6)


def test_a_unit_that_is_out_still_moves():
    model, anatomy, _, units, movement = build()
    units.attach()
    units.keep({block.name: torch.arange(1, block.units) for block in anatomy.blocks})
    units.multiply(movement.factors(1))
    loss_of(model).backward()
    movement.collect(step=1, target=0.0)
    assert all(scores[0] != 0 for scores in units.by_block(movement.scores(step=1)).values())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_magnitude_is_the_criterion(family):
    _, anatomy, layers, units, scores = build(family, movement=False)
    found = units.by_block(scores.scores(step=1))
    for block in anatomy.blocks:
        weight = consumer_weight(layers[block.layer], block).detach().double()
        none = weight.new_zeros(0)
        view = BlockView(weight, none, none, block.channels_per_unit, ratio=0.5, seed=0)
        wanted = CRITERIA["magnitude"](view).float()
        torch.testing.assert_close(magnitude(layers[block.layer], block), wanted)
        torch.testing.assert_close(found[block.name], wanted)


def test_experts_have_both_scores():
    model, anatomy, layers, units, movement = build("mixtral")
    units.attach()
    loss_of(model).backward()
    movement.collect(step=1, target=0.0)
    experts = anatomy.of_kind("experts")[0]
    assert (units.by_block(movement.scores(step=1))[experts.name] != 0).all()
    down = layers[0].get_parameter(experts.reader.tensor).detach()[2]  # (H, I)
    assert float(magnitude(layers[0], experts)[2]) == pytest.approx(float(down.norm(dim=0).mean()))


@torch.no_grad()
def test_the_model_without_masks_computes_what_it_did_with_them():
    model, anatomy, _, units, _ = build()
    dense = model(input_ids=ROWS).logits
    units.attach()
    units.keep({block.name: torch.arange(0, block.units, 2) for block in anatomy.blocks})
    units.multiply(torch.linspace(0.5, 1.5, units.count))
    masked = model(input_ids=ROWS).logits
    units.detach()
    assert torch.equal(model(input_ids=ROWS).logits, dense)
    units.fold()
    torch.testing.assert_close(model(input_ids=ROWS).logits, masked)
    assert not torch.allclose(masked, dense)


@pytest.mark.parametrize("movement", [True, False])
def test_scores_that_are_not_finite_are_refused(movement):
    model, _, layers, units, scores = build(movement=movement)
    units.attach()
    with torch.no_grad():
        layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    loss_of(model).backward()
    with pytest.raises(InputError, match="training diverged by step 7: scores of units are not finite; lower the"):
        _ = (scores.collect(step=7, target=0.0), scores.scores(step=7))
