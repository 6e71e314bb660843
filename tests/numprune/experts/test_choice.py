"""The inputs of a layer's experts, the price of their sizes, and which of them are kept."""

import pytest
import torch

from numprune.anatomy import read_anatomy
from numprune.axes import Limits
from numprune.budget import budget_of
from numprune.calibration import Walker
from numprune.curves import error_curve
from numprune.errors import InputError
from numprune.experts.choice import Scoring, choose_experts, error_table, expert_scores
from numprune.experts.inputs import Experts, Routed
from numprune.families import FAMILIES
from numprune.inputs import PropagatedInputs
from numprune.layers import ModelLayers
from numprune.options import PruneOptions
from numprune.pruning import prune
from numprune.slices import Size
from numprune.target import Target, allowed_sizes
from tests.conftest import build_tiny

ROWS = torch.randint(0, 256, (6, 20), generator=torch.Generator().manual_seed(0))
SPARSE = [name for name, family in FAMILIES.items() if family.experts]


def observed(family):
    """A layer with experts, its block, and what was seen of it."""
    layers = ModelLayers(build_tiny(family))
    walked = PropagatedInputs(Walker(layers, ROWS.shape[1:], batch_size=4), ROWS)
    for block in layers.anatomy.blocks:
        with layers.layer(block.layer) as layer:
            if block.routing:
                return layer, block, walked.experts(layer, block)
            walked.moments(layer, block)
    raise AssertionError("no experts")


@pytest.mark.parametrize("family", SPARSE)
@torch.no_grad()
def test_the_expert_contributions_sum_to_the_layer_output(family):
    layer, block, _ = observed(family)
    hidden = torch.randn(30, 64, generator=torch.Generator().manual_seed(1))
    _, weights, chosen = layer.get_submodule(block.routing.router)(hidden)
    experts = Experts(layer, block)
    output = torch.zeros_like(hidden)
    for share in experts.shares(Routed(hidden, chosen, weights)):
        output[share.tokens] += share.inputs @ experts.weights[share.expert].T
    torch.testing.assert_close(output, experts.module(hidden, chosen, weights), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_sizes_are_priced_by_the_removed_units():
    layer, block, seen = observed("mixtral")
    table = error_table(layer, block, seen, torch.eye(64))
    least = block.routing.top_k
    assert table.shape == (block.units + 1, block.members)
    assert float(table[0, 0]) == 0
    assert torch.isfinite(table[: block.units - least + 1]).all()
    assert torch.isinf(table[block.units - least + 1 :]).all()
    assert (table[: block.units - least + 1].diff(dim=1) >= 0).all()
    down = Experts(layer, block).down
    curves = sum(
        error_curve(one.double(), moments.gram, torch.eye(64), Size(block.members))[:-1, 0]
        for one, moments in zip(down, seen.moments, strict=True)
    )
    torch.testing.assert_close(table[0], curves)


@torch.no_grad()
def test_every_expert_keeps_the_same_number_of_its_own_channels():
    layer, block, seen = observed("mixtral")
    scoring = Scoring("obs", 0.5, seed=0, sensitivity=torch.eye(64))
    kept = choose_experts(layer, block, Size(3, 8), seen, scoring)
    assert kept.size == Size(3, 8)
    assert len({tuple(members) for members in kept.members.tolist()}) == 3
    scores = expert_scores(layer, block, seen, scoring)
    assert kept.units.tolist() == scores.topk(3).indices.sort().values.tolist()


def test_frequency_is_the_share_of_the_routing_weights():
    layer, block, seen = observed("mixtral")
    scores = expert_scores(layer, block, seen, Scoring("frequency", 0.5, seed=0))
    assert float(scores.sum()) == pytest.approx(1)
    assert float(seen.weight.sum()) == pytest.approx(ROWS.numel())  # a token's weights sum to 1


@pytest.mark.parametrize(("bytes_per_value", "widths"), [(4, {8, 12, 16, 20, 24}), (2, {8, 16, 24})])
def test_expert_widths_are_multiples_of_16_bytes_and_at_least_top_k_experts_stay(bytes_per_value, widths):
    config = build_tiny("mixtral", num_local_experts=4).config
    config.dtype = {4: torch.float32, 2: torch.bfloat16}[bytes_per_value]
    allowed = allowed_sizes(read_anatomy(config), Target(align=1), Limits(skips=True))["layers.0.experts"]
    assert {size.units for size in allowed} == {2, 3, 4}
    assert widths <= {size.members for size in allowed}
    assert all(size.members * bytes_per_value % 16 == 0 for size in allowed)


def test_a_token_reaches_only_its_routed_experts():
    few, many = (budget_of(read_anatomy(build_tiny("mixtral", num_local_experts=count).config)) for count in (4, 8))
    router = 2 * 4 * 64  # rows of two layers
    assert many.flops_per_token - few.flops_per_token == 2 * router
    assert many.parameters > few.parameters


def test_fewer_experts_than_top_k_are_refused():
    config = build_tiny("mixtral").config
    config.num_local_experts = 1
    with pytest.raises(InputError, match="layer 0: num_local_experts=1 is less than num_experts_per_tok=2"):
        read_anatomy(config)


def test_a_sparse_step_of_zero_is_refused():
    config = build_tiny("qwen3_moe").config
    config.decoder_sparse_step = 0
    with pytest.raises(InputError, match="decoder_sparse_step=0; it must be a positive integer"):
        read_anatomy(config)


def test_frequency_is_refused_without_experts():
    with pytest.raises(InputError, match="criterion frequency ranks experts, and llama has none"):
        prune(build_tiny(), ROWS, PruneOptions(0.2, criterion="frequency"))
