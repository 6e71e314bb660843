"""The loss: the divergence of a model's predictions from the dense model's."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from numprune.tasks import CAUSAL, Predictions, Task
from numprune.tasks.language import kl_divergence, log_probabilities
from numprune.tasks.task import parts

# Up to this many logits are kept for the gradient, in a few tensors of 128 MiB; more are recomputed.
KEPT_VALUES = 1 << 25


class Distillation(nn.Module):
    """A model and its dense target: maps rows (n, S) to the sum of their divergence over all predictions.

    For a causal language model, that is KL(p || q) of n (S - 1) tokens over the full vocabulary, a few positions at a
    time; many logits are recomputed for the gradient, so that memory does not grow with V.
    """

    def __init__(self, model: PreTrainedModel, dense: PreTrainedModel, task: Task = CAUSAL) -> None:
        super().__init__()
        self.model = model
        self._task, self._dense = task, [dense]  # in a list, so that it is not a submodule and not trained

    def forward(self, rows: Tensor) -> Tensor:
        """Return the sum, a scalar in the unit of the task's loss, float64."""
        (dense,) = self._dense
        ours = outputs(self._task, self.model, rows)
        with torch.no_grad():
            theirs = outputs(self._task, dense, rows)
        return divergence(self._task, (self.model, ours), (dense, theirs), rows)


def outputs(task: Task, model: PreTrainedModel, rows: Tensor) -> Tensor:
    """Return what `divergence` compares: of a causal language model the last hidden states of rows (n, S)."""
    if task.name == CAUSAL.name:
        return task.predictions(model).states([], rows)
    return task.output(model, rows, torch.ones_like(rows))


def divergence(
    task: Task, model: tuple[PreTrainedModel, Tensor], dense: tuple[PreTrainedModel, Tensor], rows: Tensor
) -> Tensor:
    """Return the sum of the divergence of two models, each with its `outputs` of rows (n, S), a scalar, float64.

    The dense one is not trained.
    """
    if task.name != CAUSAL.name:
        return task.divergence(model[1], dense[1], rows).sum()
    ours, theirs = (task.predictions(one) for one, _ in (model, dense))
    return _of_states(ours, model[1], theirs, dense[1])


def _of_states(ours: Predictions, states: Tensor, theirs: Predictions, wanted: Tensor) -> Tensor:
    """Return the sum of KL(p || q) over states (n, P, H) of two models, in nats."""

    def of_part(some: Tensor, same: Tensor) -> Tensor:
        with torch.no_grad():
            target = log_probabilities(theirs, same)
        return kl_divergence(log_probabilities(ours, some), target).sum()

    kept = states.shape[:2].numel() * ours.size <= KEPT_VALUES
    of_each = of_part if kept else partial(checkpoint, of_part, use_reentrant=False)
    return torch.stack([of_each(*part) for part in parts(ours.size, states, wanted)]).sum()
