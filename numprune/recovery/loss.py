"""The loss: how far a model's distributions of the next token are from the dense one's."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from numprune.tasks import CAUSAL, Predictions
from numprune.tasks.language import kl_divergence, log_probabilities
from numprune.tasks.task import parts


class Distillation(nn.Module):
    """A model with the dense one that it is to follow: rows (n, S) to the sum of KL(p || q) over all n (S - 1) tokens.

    The full vocabulary counts, a few positions at a time: their logits are computed again for the gradient, so that
    memory does not grow with V.
    """

    def __init__(self, model: PreTrainedModel, dense: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self._dense = CAUSAL.predictions(dense)  # no part of this module: it is not trained

    def forward(self, rows: Tensor) -> Tensor:
        """Return the sum, a scalar in nats, float64."""
        ours, theirs = CAUSAL.predictions(self.model), self._dense
        states = ours.states([], rows)
        with torch.no_grad():
            wanted = theirs.states([], rows)
        return divergence(ours, states, theirs, wanted)


def divergence(ours: Predictions, states: Tensor, theirs: Predictions, wanted: Tensor) -> Tensor:
    """Return the sum of KL(p || q) over states (n, P, H) of two models, a scalar in nats, float64; p is not trained."""

    def of_part(some: Tensor, same: Tensor) -> Tensor:
        with torch.no_grad():
            target = log_probabilities(theirs, same)
        return kl_divergence(log_probabilities(ours, some), target).sum()

    sums = [checkpoint(of_part, *part, use_reentrant=False) for part in parts(ours.size, states, wanted)]
    return torch.stack(sums).sum()
