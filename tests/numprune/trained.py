"""Small models, briefly trained on the embedded text, for tests that need trained weights."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from numprune.flows.embedded.corpus import Split, documents
from tests.conftest import byte_tokenizer

LENGTH, STEPS = 64, 150


def rows(split: Split, count: int) -> Tensor:
    """(count, LENGTH) tokens, a byte each."""
    tokenizer, tokens = byte_tokenizer(), []
    for _, text in documents(split):
        tokens += tokenizer(text)["input_ids"]
        if len(tokens) >= count * LENGTH:
            break
    return torch.tensor(tokens[: count * LENGTH]).view(count, LENGTH)


def train(model: PreTrainedModel, **options: Any) -> PreTrainedModel:
    """Train the model in place and return it; `options` go to its forward pass. Draws from torch's global generator."""
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 8e-3, total_steps=STEPS)
    text = rows("train", 800)
    for _ in range(STEPS):
        batch = text[torch.randint(len(text), (16,))]
        model(input_ids=batch, labels=batch, use_cache=False, **options).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def divergence(model: PreTrainedModel, other: PreTrainedModel, text: Tensor) -> float:
    """KL(model || other) on rows (n, S), nats per token."""
    ours, theirs = (one(input_ids=text, use_cache=False).logits.log_softmax(-1) for one in (model, other))
    return float((ours.exp() * (ours - theirs)).sum(-1).mean())
