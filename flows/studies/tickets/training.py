"""The small language model of the study, and its training with masks. A token is a byte."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from numprune.errors import InputError
from numprune.flows.studies.tickets.masks import Masks
from numprune.recovery.options import RowOrder, learning_rate_factor

LENGTH = 128  # bytes of a row
BATCH_SIZE = 8
_LEARNING_RATE = 1.5e-3  # AdamW's, at its highest; twice as much spreads the NLL of seeds by 0.1 nats per byte
_MOMENT = "@"  # between the name of a weight and that of its moment
_BETAS, _CLIP = (0.9, 0.95), 1.0


@dataclass(frozen=True)
class Training:
    """How a model is trained.

    Attributes:
        rows: (N, LENGTH) int64.
        steps: per training.
        seed: of the order of the rows.
    """

    rows: Tensor
    steps: int
    seed: int

    def run(
        self,
        model: PreTrainedModel,
        masks: Masks,
        first: int,
        start: Mapping[str, Tensor],
        after: Callable[[int, Optimizer], object],
    ) -> None:
        """Train in place from step `first` on; rows and learning rates continue from there.

        Args:
            masks: what they remove is zero throughout.
            start: `state_of` the training to continue; empty: the model as it is, with a new optimizer.
            after: called after each step with the number of steps done and the optimizer.

        Raises:
            InputError: the loss is not finite.
        """
        weights = {name: model.get_parameter(name) for name in masks}
        optimizer = torch.optim.AdamW(model.parameters(), _LEARNING_RATE, _BETAS, weight_decay=0.0)
        _restore(model, optimizer, start)
        order = RowOrder(len(self.rows), BATCH_SIZE, self.seed)
        _apply(weights, masks)
        for step in range(first, self.steps):
            for group in optimizer.param_groups:
                group["lr"] = _LEARNING_RATE * learning_rate_factor(step, self.steps)
            loss = nll(model, self.rows[order.batch(step)])
            if not math.isfinite(loss.item()):
                raise InputError(f"training diverged at step {step + 1} of {self.steps}: the loss is {loss.item():g}")
            loss.backward()
            for name, weight in weights.items():
                assert weight.grad is not None
                weight.grad.mul_(masks[name])
            torch.nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
            optimizer.step()
            optimizer.zero_grad()
            _apply(weights, masks)
            after(step + 1, optimizer)


def state_of(model: PreTrainedModel, optimizer: Optimizer | None = None) -> dict[str, Tensor]:
    """Return copies of the weights by name, and of AdamW's moments and step counts, NAME@exp_avg and so on.

    Without the moments, the first steps of a ticket would be about as long as its learning rate in every coordinate,
    and would undo part of what it is rewound to.
    """
    named = dict(model.named_parameters())
    moments = {
        f"{name}{_MOMENT}{moment}": value
        for name, weight in named.items()
        for moment, value in (optimizer.state.get(weight, {}) if optimizer else {}).items()
    }
    return {name: tensor.detach().clone() for name, tensor in (named | moments).items()}


def _restore(model: PreTrainedModel, optimizer: Optimizer, state: Mapping[str, Tensor]) -> None:
    model.load_state_dict(
        {name: tensor for name, tensor in state.items() if _MOMENT not in name},
        strict=False,  # tied weights are stored once
    )
    for name, tensor in state.items():
        weight, _, moment = name.partition(_MOMENT)
        if moment:
            optimizer.state[model.get_parameter(weight)][moment] = tensor.clone()


@torch.no_grad()
def _apply(weights: dict[str, torch.nn.Parameter], masks: Masks) -> None:
    for name, weight in weights.items():
        weight.mul_(masks[name])


def nll(model: PreTrainedModel, rows: Tensor) -> Tensor:
    """Return the mean NLL of rows (n, S), a scalar in nats per byte."""
    logits = model(input_ids=rows, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def heldout_nll(model: PreTrainedModel, rows: Tensor) -> float:
    """Return the mean NLL of held-out rows, nats per byte."""
    parts = rows.split(32)
    return sum(float(nll(model, part)) * len(part) for part in parts) / len(rows)


def build(seed: int) -> PreTrainedModel:
    """Return the untrained model: 4 layers, hidden size 96, 6 heads of 16 channels, MLPs of 256 channels."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def byte_rows(documents: Iterable[str], most: int) -> Tensor:
    """Return the first `most` windows of the documents' bytes, or all, (N, LENGTH) int64.

    Raises:
        InputError: the text is shorter than one window.
    """
    content = bytearray()
    for document in documents:
        content += f"{document}\n\n".encode()
        if len(content) >= most * LENGTH:
            break
    count = min(most, len(content) // LENGTH)
    if not count:
        raise InputError(f"the text has {len(content)} bytes, and a row takes {LENGTH}; give more text")
    return torch.frombuffer(content, dtype=torch.uint8)[: count * LENGTH].long().view(count, LENGTH)
