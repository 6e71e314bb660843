"""The loss: the divergence of a model's predictions from the dense model's."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from numprune.anatomy import layers_path
from numprune.tasks import CAUSAL, Predictions, Task
from numprune.tasks.language import bucketed, kl_divergence, log_probabilities
from numprune.tasks.task import parts

# Up to this many logits are kept for the gradient, in a few tensors of 128 MiB; more are recomputed.
KEPT_VALUES = 1 << 25


class Distillation(nn.Module):
    """A model and its dense target: maps rows (n, S) to the sum of their divergence over all predictions.

    For a causal language model, that is KL(p || q) of n (S - 1) tokens, a few positions at a time; many logits are
    recomputed for the gradient, so that memory does not grow with V.

    Args:
        model: to train.
        dense: with the same vocabulary.
        top_k: only for causal language models: compare the dense model's top_k tokens, and all others as one; None:
            compare all tokens.
        hidden_weight: adds this weight times 1 - cos of the two models' hidden states after each layer, averaged over
            layers and tokens, for each prediction.
        dropped: layers of `dense` that `model` does not have.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        dense: PreTrainedModel,
        task: Task = CAUSAL,
        *,
        top_k: int | None = None,
        hidden_weight: float = 0.0,
        dropped: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.model = model
        self._task, self._dense = task, [dense]  # in a list, so that it is not a submodule and not trained
        self._top_k, self._hidden_weight = top_k, hidden_weight
        layers = [list(one.get_submodule(layers_path(one.config)).children()) for one in (model, dense)]
        self._pairs = layers[0], [layer for index, layer in enumerate(layers[1]) if index not in dropped]

    def forward(self, rows: Tensor) -> Tensor:
        """Return the sum, a scalar in the unit of the task's loss, float64."""
        (dense,) = self._dense
        ours, theirs = self._pairs if self._hidden_weight else ((), ())
        with recorded(ours) as our_states:
            output = outputs(self._task, self.model, rows)
        with torch.no_grad(), recorded(theirs) as their_states:
            wanted = outputs(self._task, dense, rows)
        total = divergence(self._task, (self.model, output), (dense, wanted), rows, self._top_k)
        if self._hidden_weight:
            distance = hidden_distance(our_states, their_states).to(total.device)
            total = total + self._hidden_weight * distance * len(rows) * self._task.predictions_in(rows.shape[1])
        return total


@contextmanager
def recorded(layers: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Record the hidden states after each layer, (n, S, H) each, in the order of the layers."""
    states: list[Tensor] = []

    def record(_: nn.Module, __: Any, output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    hooks = [layer.register_forward_hook(record) for layer in layers]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


def hidden_distance(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
    """Return 1 - cos of the hidden states (n, S, H) of two models, averaged over layers and tokens: a float64 scalar.

    Minitron trains with this term (Muralidharan et al., NeurIPS 2024; NVIDIA Model Optimizer pairs the same layers).
    """
    found = [
        1 - nn.functional.cosine_similarity(one.float(), other.to(one.device).float(), dim=-1).mean()
        for one, other in zip(ours, theirs, strict=True)
    ]
    return torch.stack([one.to(found[0].device) for one in found]).mean().double()


def outputs(task: Task, model: PreTrainedModel, rows: Tensor) -> Tensor:
    """Return what `divergence` compares: of a causal language model the last hidden states of rows (n, S)."""
    if task.name == CAUSAL.name:
        return task.predictions(model).states([], rows)
    return task.output(model, rows, torch.ones_like(rows))


def divergence(
    task: Task,
    model: tuple[PreTrainedModel, Tensor],
    dense: tuple[PreTrainedModel, Tensor],
    rows: Tensor,
    top_k: int | None = None,
) -> Tensor:
    """Return the sum of the divergence of two models, each with its `outputs` of rows (n, S), a scalar, float64.

    The dense one is not trained. `top_k`: as for `Distillation`.
    """
    if task.name != CAUSAL.name:
        return task.divergence(model[1], dense[1], rows).sum()
    ours, theirs = (task.predictions(one) for one, _ in (model, dense))
    return _of_states(ours, model[1], theirs, dense[1], top_k)


def _of_states(ours: Predictions, states: Tensor, theirs: Predictions, wanted: Tensor, top_k: int | None) -> Tensor:
    """Return the sum of KL(p || q) over states (n, P, H) of two models, in nats."""

    def of_part(some: Tensor, same: Tensor) -> Tensor:
        if top_k is not None and top_k < ours.size:
            with torch.no_grad():
                logits = theirs.head(same).float()
                top = logits.topk(top_k, sorted=False).indices
                target = bucketed(logits, top)
            return kl_divergence(bucketed(ours.head(some).float(), top), target).sum()
        with torch.no_grad():
            target = log_probabilities(theirs, same)
        return kl_divergence(log_probabilities(ours, some), target).sum()

    kept = states.shape[:2].numel() * ours.size <= KEPT_VALUES
    of_each = of_part if kept else partial(checkpoint, of_part, use_reentrant=False)
    return torch.stack([of_each(*part) for part in parts(ours.size, states, wanted)]).sum()
