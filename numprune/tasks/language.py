"""NLL of tokens, and differences between two language models' token distributions."""

from collections.abc import Callable
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from numprune.corpus import TokenRows
from numprune.errors import InputError, IntegrityError
from numprune.tasks.task import Comparison, Predictions, Quality, Task, batches, compared, parts


class LanguageTask(Task, Protocol):
    """A task whose predictions are distributions over tokens of the text.

    Attributes:
        kl: name of the metric that is the mean KL divergence, with its unit.
    """

    kl: ClassVar[str]

    def targets(self, rows: TokenRows, index: list[int], tokens: Tensor) -> Tensor:
        """Return the tokens (n, P) to predict in the rows `index`, whose tokens are (n, S)."""

    def add(self, sums: np.ndarray, rows: TokenRows, index: list[int], values: np.ndarray) -> None:
        """Add values (n, P) of the rows `index` to the `sums` (spans,) of their spans."""


def evaluate(
    task: LanguageTask,
    model: Predictions,
    rows: TokenRows,
    batch_size: int,
    keep: Callable[[list[int], Tensor], None] | None = None,
) -> Quality:
    """Return the NLL of `model`; the arguments are those of `Task.evaluate`."""
    nll = np.zeros(len(rows.document))
    for index, tokens in batches(rows, batch_size, "evaluate"):
        states = model.states(index, tokens)
        if keep is not None:
            keep(index, states)
        targets = task.targets(rows, index, tokens).to(states.device)
        by_token = torch.cat(
            [token_nll(log_probabilities(model, some), wanted) for some, wanted in parts(model.size, states, targets)]
        )
        task.add(nll, rows, index, by_token.view(len(index), -1).cpu().numpy())
    return Quality(nll, task.scored(rows))


def compare(
    task: LanguageTask, model: Predictions, baseline: Predictions, rows: TokenRows, batch_size: int, seed: int
) -> Comparison:
    """Compare NLL, KL(baseline || model) and the most probable token; the arguments are those of `Task.compare`."""
    if model.size != baseline.size:
        raise InputError(f"vocabularies differ: {model.size} and {baseline.size} (baseline)")
    nll, baseline_nll, kl, agree = sums = np.zeros((4, len(rows.document)))
    for index, tokens in batches(rows, batch_size, "compare"):
        ours, theirs = model.states(index, tokens), baseline.states(index, tokens)
        targets = task.targets(rows, index, tokens).to(ours.device)
        by_token = torch.cat(
            [
                _differences(log_probabilities(model, one), log_probabilities(baseline, other), wanted)
                for one, other, wanted in parts(baseline.size, ours, theirs, targets)
            ],
            dim=1,
        )
        for total, values in zip(sums, by_token.view(4, len(index), -1).cpu().numpy(), strict=True):
            task.add(total, rows, index, values)
    scored = task.scored(rows)
    metrics = {task.kl: float(kl.sum() / scored.sum()), "top1_agreement": float(agree.sum() / scored.sum())}
    sides = Quality(nll, scored), Quality(baseline_nll, scored)
    return compared(task, rows, nll - baseline_nll, metrics, seed, *sides)


def log_probabilities(model: Predictions, states: Tensor) -> Tensor:
    """Return (p, V) in float32 of states (p, F)."""
    return model.head(states).float().log_softmax(-1)


def token_nll(log_probabilities: Tensor, targets: Tensor) -> Tensor:
    """Return the NLL of each target, (p,) in nats, float64 so that long sums stay exact.

    A NaN or infinite logit makes every probability of its position NaN, or that of the right token zero. Either way,
    its NLL is not finite, and checking that is cheaper than checking all logits.
    """
    nll = -log_probabilities.gather(-1, targets[:, None])[:, 0].double()
    if not torch.isfinite(nll).all():
        raise IntegrityError("the model's probabilities are not finite; its weights are damaged or overflow")
    return nll


def kl_divergence(ours: Tensor, theirs: Tensor) -> Tensor:
    """Return KL(theirs || ours), (p,) float64, of log-probabilities (p, V)."""
    return (theirs.exp() * (theirs - ours)).sum(-1).double()


def bucketed(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the log-probabilities (p, k + 1) of these tokens (p, k), and of all others together, from logits (p, V).

    The KL of two such distributions is a lower bound on that over the whole vocabulary.
    """
    others = logits.scatter(-1, tokens, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logits.gather(-1, tokens), others], -1).log_softmax(-1)


def logits_divergence(ours: Tensor, theirs: Tensor) -> Tensor:
    """Return KL(theirs || ours), (p,) float64, of logits (…, V)."""
    ours, theirs = (logits.flatten(0, -2).float().log_softmax(-1) for logits in (ours, theirs))
    return kl_divergence(ours, theirs)


def _differences(ours: Tensor, theirs: Tensor, targets: Tensor) -> Tensor:
    """Return (4, p) float64 of log-probabilities (p, V): NLL of ours, of theirs, KL(theirs || ours), same top token."""
    agree = (ours.argmax(-1) == theirs.argmax(-1)).double()
    return torch.stack([token_nll(ours, targets), token_nll(theirs, targets), kl_divergence(ours, theirs), agree])


def draw_labels(log_probabilities: Tensor, draw: torch.Generator) -> Tensor:
    """Return a label (p,) drawn from each of the distributions (p, V), by a generator on the CPU."""
    chances = torch.rand(len(log_probabilities), 1, generator=draw).to(log_probabilities.device)
    drawn = (log_probabilities.detach().exp().cumsum(-1) < chances).sum(-1)
    return drawn.clamp_max(log_probabilities.shape[-1] - 1)  # the cumulative sum may end just below 1


def skip_labels(count: int, draw: torch.Generator) -> None:
    """Leave out the next `count` labels that `draw_labels` would draw."""
    torch.rand(count, 1, generator=draw)


def drawn_nll(logits: Tensor, draw: torch.Generator) -> Tensor:
    """Return the summed NLL of labels drawn by logits (…, V): E[g g^T] of its gradient is the Fisher matrix."""
    flat = logits.flatten(0, -2).float()
    return functional.cross_entropy(flat, draw_labels(flat.log_softmax(-1), draw), reduction="sum")
