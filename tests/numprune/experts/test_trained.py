"""A briefly trained mixture of experts: which experts are removed matters, and so does the refit.

Its router was trained to use all experts alike, as large models' are: how often an expert is used says little.
"""

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from numprune.options import PruneOptions
from numprune.pruning import prune
from numprune.target import Target
from tests.conftest import TINY
from tests.numprune.trained import divergence, rows, train

pytestmark = pytest.mark.slow

RATIOS = (0.2, 0.38)  # two and four of the eight experts


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(1)
    sizes = {**TINY, "num_hidden_layers": 1, "intermediate_size": 48, "num_local_experts": 8}
    model = MixtralForCausalLM(MixtralConfig(**sizes, num_experts_per_tok=2, router_aux_loss_coef=0.3))
    return train(model, output_router_logits=True)


@pytest.fixture(scope="module")
def lost(trained):
    """`lost(ratio, …)`: KL from the dense model to the one without so many experts, nats per token of held-out text."""
    calibration, held_out = rows("train", 96), rows("heldout", 96)

    def measure(ratio, **options):
        options = PruneOptions(ratio, axes=("experts",), target=Target(align=1), **options)
        return divergence(trained, prune(trained, calibration, options).model, held_out)

    return measure


def test_obs_chooses_better_than_frequency_and_chance(lost):
    def total(criterion, seed=0):
        return sum(lost(ratio, criterion=criterion, compensation="none", seed=seed) for ratio in RATIOS)

    obs = total("obs")
    assert obs < total("frequency")
    assert obs < (total("random", seed=0) + total("random", seed=1)) / 2


def test_remaining_experts_compensate_for_removed_ones(lost):
    none, oneshot, residual = (lost(RATIOS[1], compensation=name) for name in ("none", "oneshot", "residual"))
    assert oneshot < 0.8 * none
    assert residual < 0.8 * none
