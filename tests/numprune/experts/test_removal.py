"""Greedy removal of experts: its losses are those of the model without them."""

from itertools import combinations

import pytest
import torch

from numprune.anatomy import read_anatomy
from numprune.experts.inputs import Experts
from numprune.experts.removal import greedy_experts, overlaps, routing_weights
from numprune.families import FAMILIES
from numprune.slices import Kept
from numprune.surgery import narrowed
from tests.conftest import build_tiny

SPARSE = [name for name, family in FAMILIES.items() if family.experts]


def sparse_layer(family):
    model = build_tiny(family)
    block = read_anatomy(model.config).of_kind("experts")[-1]
    return model.get_submodule(block.path), block, torch.randn(60, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", SPARSE)
@torch.no_grad()
def test_the_first_expert_removed_is_the_cheapest(family):
    layer, block, hidden = sparse_layer(family)

    def output(of):
        _, weights, experts = of.get_submodule(block.routing.router)(hidden)
        return of.get_submodule(block.consumer)(hidden, experts, weights)

    sensitivity = torch.randn(64, 64, generator=torch.Generator().manual_seed(2))
    sensitivity = sensitivity @ sensitivity.T
    losses = []
    for gone in range(block.units):
        units = torch.tensor([unit for unit in range(block.units) if unit != gone])
        missing = output(layer) - output(narrowed(layer, block, Kept.whole(units, block.members)))
        losses.append(float(torch.einsum("th,hi,ti->t", missing, sensitivity, missing).mean() / 2))
    logits = layer.get_submodule(block.routing.router)(hidden)[0]
    overlap = overlaps(Experts(layer, block).outputs(hidden), sensitivity)
    order, found = greedy_experts(logits, overlap, block.routing, block.units - 1)
    assert int(order[0]) == losses.index(min(losses))
    assert float(found[0]) == pytest.approx(min(losses), rel=1e-3)


@pytest.mark.parametrize("family", SPARSE)
@torch.no_grad()
def test_greedy_losses_are_those_of_the_remaining_experts(family):
    layer, block, hidden = sparse_layer(family)
    logits = layer.get_submodule(block.routing.router)(hidden)[0]
    overlap = overlaps(Experts(layer, block).outputs(hidden), torch.eye(64))
    order, losses = greedy_experts(logits, overlap, block.routing, block.routing.top_k)
    assert len(order) == block.units - block.routing.top_k
    assert (losses.diff() > 0).all()

    def loss(gone):
        left = logits.index_fill(1, torch.tensor(gone), -torch.inf)
        missing = routing_weights(logits, block.routing) - routing_weights(left, block.routing)
        return float(torch.einsum("te,tef,tf->t", missing, overlap, missing).mean() / 2)

    for removed in range(1, len(order) + 1):
        assert float(losses[removed - 1]) == pytest.approx(loss(order[:removed].tolist()), rel=1e-4)
    every = [loss(list(gone)) for gone in combinations(range(block.units), 2)]
    assert float(losses[1]) <= sorted(every)[1]  # greedy is not always the best pair, but nearly
