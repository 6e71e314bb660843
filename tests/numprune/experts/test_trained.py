"""A mixture of experts trained a little: which experts go matters, and so does the refit of those that stay.

Its router was trained to use all experts alike, as large models' are: how often an expert is used says little.
"""

import copy

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from numprune.flows.embedded.corpus import documents
from numprune.options import PruneOptions
from numprune.pruning import prune
from numprune.target import Target
from tests.conftest import TINY, byte_tokenizer

LENGTH, STEPS = 64, 150
RATIOS = (0.2, 0.38)  # two and four of the eight experts


def rows(split, count):
    tokenizer, tokens = byte_tokenizer(), []
    for _, text in documents(split):
        tokens += tokenizer(text)["input_ids"]
        if len(tokens) >= count * LENGTH:
            break
    return torch.tensor(tokens[: count * LENGTH]).view(count, LENGTH)


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(1)
    sizes = {**TINY, "num_hidden_layers": 1, "intermediate_size": 48, "num_local_experts": 8}
    model = MixtralForCausalLM(MixtralConfig(**sizes, num_experts_per_tok=2, router_aux_loss_coef=0.3))
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 8e-3, total_steps=STEPS)
    text = rows("train", 800)
    for _ in range(STEPS):
        batch = text[torch.randint(len(text), (16,))]
        model(input_ids=batch, labels=batch, output_router_logits=True, use_cache=False).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def lost(trained):
    """`lost(ratio, …)`: KL from the dense model to the one without so many experts, nats per token of held-out text."""
    calibration, held_out = rows("train", 96), rows("heldout", 96)

    @torch.no_grad()
    def predictions(model):
        return model(input_ids=held_out, use_cache=False).logits.log_softmax(-1)

    dense = predictions(trained)

    def measure(ratio, **options):
        options = PruneOptions(ratio, axes=("experts",), target=Target(align=1), **options)
        pruned = predictions(prune(copy.deepcopy(trained), calibration, options).model)
        return float((dense.exp() * (dense - pruned)).sum(-1).mean())

    return measure


def test_obs_chooses_better_than_frequency_and_chance(lost):
    def total(criterion, seed=0):
        return sum(lost(ratio, criterion=criterion, compensation="none", seed=seed) for ratio in RATIOS)

    obs = total("obs")
    assert obs < total("frequency")
    assert obs < (total("random", seed=0) + total("random", seed=1)) / 2


def test_what_stays_takes_over_what_went(lost):
    none, oneshot, residual = (lost(RATIOS[1], compensation=name) for name in ("none", "oneshot", "residual"))
    assert oneshot < 0.8 * none
    assert residual < 0.8 * none
