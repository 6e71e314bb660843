"""Masks trained beside the weights of a user's training: their gradients, and what they rank."""

import pytest
import torch

from numprune.anatomy import read_anatomy
from numprune.learning.constraint import Constraint, share_of
from numprune.learning.masks import Masked, Masks, masked
from numprune.learning.training import BETA, MASK_RATE, QUADRATIC
from numprune.schedules.bottleneck import Bottleneck
from numprune.schedules.units import Units
from tests.conftest import build_tiny

ROWS = torch.randint(0, 256, (4, 12), generator=torch.Generator().manual_seed(0))


def loss_of(model):
    return model(input_ids=ROWS, labels=ROWS, use_cache=False).loss


def build(family="llama"):
    model = build_tiny(family)
    anatomy = read_anatomy(model.config)
    layers = model.get_submodule(anatomy.layers_path)
    units = Units(layers, anatomy.blocks, gradients=True)
    return model, anatomy, layers, units, Bottleneck(units, anatomy, steps=10, seed=3)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_step_descends_the_loss_the_information_and_the_penalty(family):
    model, anatomy, layers, units, bottleneck = build(family)
    target, z = 0.9, bottleneck.factors(1)
    units.attach()
    units.multiply(z)
    loss_of(model).backward()
    bottleneck.collect(1, target)
    units.detach()
    found = bottleneck.state()

    constraint = Constraint("parameters", anatomy, 1)
    masks = Masks([Masked(block, constraint.of_unit(block)) for block in anatomy.blocks], seed=3)
    noise = ((z - masks.mean) / (masks.log_variance / 2).exp()).detach()
    leaves = masks.mean + (masks.log_variance / 2).exp() * noise
    with masked(layers, masks, leaves[None]):
        loss = loss_of(model)
    slopes = torch.autograd.grad(loss, leaves, retain_graph=True)[0].abs().sum()
    excess = share_of(constraint, masks).kept(masks) - target
    total = loss + BETA * (masks.weights @ masks.information) + slopes.detach() * QUADRATIC * excess.square()
    total.backward()
    for name, value in masks.named_parameters():
        torch.testing.assert_close(10 * found[f"exp_avg/{name}"], value.grad, rtol=1e-3, atol=1e-6)
        assert float((found[name] - value.detach()).abs().max()) == pytest.approx(
            MASK_RATE, rel=0.05
        )  # Adam's first step


def test_the_noise_of_a_step_depends_on_nothing_but_the_seed_and_the_step():
    _, anatomy, _, units, bottleneck = build()
    same, other = (Bottleneck(units, anatomy, steps=10, seed=seed) for seed in (3, 4))
    assert torch.equal(bottleneck.factors(7), same.factors(7))
    assert not torch.equal(bottleneck.factors(7), bottleneck.factors(8))
    assert not torch.equal(bottleneck.factors(7), other.factors(7))
    assert torch.equal(bottleneck.factors(None), bottleneck.state()["mean"])


def test_masks_of_removed_units_are_trained_as_if_they_multiplied_them():
    model, anatomy, layers, units, bottleneck = build()
    units.attach()
    units.keep({block.name: torch.arange(1, block.units) for block in anatomy.blocks})
    z = bottleneck.factors(1)
    units.multiply(z)
    loss_of(model).backward()
    bottleneck.collect(1, target=1.0)
    units.detach()
    for part in units.by_block(z).values():
        part[0] = 0
    masks = Masks([Masked(block, 1.0) for block in anatomy.blocks], seed=3)
    with masked(layers, masks, z.requires_grad_()[None]):
        (slopes,) = torch.autograd.grad(loss_of(model), z)
    firsts = [float(part[0]) for part in units.by_block(slopes).values()]
    found = [float(10 * part[0]) for part in units.by_block(bottleneck.state()["exp_avg/mean"]).values()]
    assert found == pytest.approx(firsts, rel=0.05)
