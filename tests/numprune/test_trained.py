"""Briefly trained models of other families than Llama: better methods lose less."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from numprune.families import FAMILIES
from numprune.options import PruneOptions
from numprune.pruning import prune
from numprune.target import Target
from tests.conftest import OF_FAMILY, TINY
from tests.numprune.trained import divergence, rows, train


# At these ratios MLP channels go and all heads stay: one of two KV groups would decide more than any method.
@pytest.mark.parametrize(("family", "ratio"), [("gpt2", 0.3), ("gemma3_text", 0.2)])
@pytest.mark.slow
def test_random_is_worse_than_magnitude_and_magnitude_worse_than_obs_with_joint(family, ratio):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **TINY, **OF_FAMILY[family])
    implementation = FAMILIES[family].attention_implementation
    dense = train(AutoModelForCausalLM.from_config(config, attn_implementation=implementation))
    calibration, held_out = rows("train", 96), rows("heldout", 96)

    def lost(criterion, compensation, seed=0):
        options = PruneOptions(ratio, criterion=criterion, compensation=compensation, seed=seed, target=Target(align=1))
        return divergence(dense, prune(dense, calibration, options).model, held_out)

    random = sum(lost("random", "none", seed) for seed in range(3)) / 3
    magnitude, joint = lost("magnitude", "none"), lost("obs", "joint")
    assert joint < 0.5 * magnitude
    assert magnitude < random
