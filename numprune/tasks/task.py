"""What a model is for: how its text becomes rows, what it predicts, and how its loss is counted.

A row's *predictions* are its next-token distributions (causal LM), those of its masked tokens (masked LM), its class
distribution (classification) or its sentence embedding. P is how many a row has, V the size of each, and F that of the
*state* which the model's head makes a prediction of.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from numprune.bootstrap import Estimate, bootstrap_mean
from numprune.corpus import Pack, TokenRows
from numprune.documents import Document
from numprune.families.family import TaskName
from numprune.progress import Progress

# Fewer documents bound nothing that is of use. Windows take their place, which say something of this text alone: those
# of one document are alike.
MINIMUM_DOCUMENTS = 5

# Predictions are computed for a few positions at a time, so that memory depends neither on the batch nor on the
# vocabulary: 2^23 values are 32 MiB. A batch of 8 rows of 512 tokens has 805 MB of them where there are 49,152 words.
MAXIMUM_VALUES = 1 << 23


@dataclass(frozen=True)
class Predictions:
    """A model's predictions of token rows, as what they are computed from.

    Attributes:
        states: row indices (n,) and their tokens (n, S) to states (n, P, F).
        head: states (p, F) to logits or embeddings (p, V).
        size: V.
    """

    states: Callable[[list[int], Tensor], Tensor]
    head: Callable[[Tensor], Tensor]
    size: int


@dataclass(frozen=True)
class Quality:
    """NLL of one model, by span: what a row has of one document (a whole row, where rows are not packed).

    Attributes:
        nll: (spans,) summed NLL in nats, float64.
        scored: (spans,) how many predictions were scored: tokens, masked tokens or texts.
        accuracy: share of texts whose most probable class is their label; None where the task has no labels.
    """

    nll: np.ndarray
    scored: np.ndarray
    accuracy: float | None = None

    @property
    def count(self) -> int:
        return int(self.scored.sum())

    @property
    def mean_nll(self) -> float:
        """In nats for each scored prediction."""
        return float(self.nll.sum() / self.scored.sum())

    @property
    def perplexity(self) -> float:
        return math.exp(self.mean_nll)


@dataclass(frozen=True)
class Comparison:
    """A candidate against its baseline on the same rows.

    Attributes:
        task: its name.
        unit: of the loss, as in "nats/token".
        documents: how many the text has.
        candidate, baseline: their NLL; None where the task has none without the other model.
        difference: (spans,) the candidate's loss minus the baseline's, summed, float64.
        scored: (spans,) how many predictions the sums are of.
        loss_delta: mean difference, paired by prediction.
        metrics: further figures of the task by name.
    """

    task: TaskName
    unit: str
    documents: int
    candidate: Quality | None
    baseline: Quality | None
    difference: np.ndarray
    scored: np.ndarray
    loss_delta: Estimate
    metrics: Mapping[str, float]


class Task(Protocol):
    """What the rest of the code asks of a task.

    Attributes:
        name: of the task.
        unit: of its loss.
        generates: it continues a prompt token by token, with a KV cache.
        pooled: a row has one loss, of all its tokens together.
    """

    name: ClassVar[TaskName]
    unit: ClassVar[str]
    generates: ClassVar[bool]
    pooled: ClassVar[bool]

    def calibration_rows(
        self, documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, length: int, pack: Pack = "auto"
    ) -> TokenRows:
        """Return the text as windows of at most `length` tokens, as the model is fed with them. Raises InputError."""

    def heldout_rows(
        self, documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, length: int, pack: Pack = "auto"
    ) -> TokenRows:
        """Return the text as rows of at most `length` tokens for `evaluate` and `compare`. Raises InputError."""

    def predictions_in(self, length: int) -> int:
        """Return P of a row of so many tokens."""

    def scored(self, rows: TokenRows) -> np.ndarray:
        """Return how many predictions each span has, (spans,) int64."""

    def has_loss(self, rows: TokenRows) -> bool:
        """Whether a model has an NLL on these rows by itself, and not only a difference from a baseline."""

    def predictions(self, model: PreTrainedModel) -> Predictions:
        """Return those of a model in memory."""

    def evaluate(
        self,
        model: Predictions,
        rows: TokenRows,
        batch_size: int,
        keep: Callable[[list[int], Tensor], None] | None = None,
    ) -> Quality | None:
        """Return the NLL of `model`, None unless it `has_loss`. `keep`: as of quality.evaluate.

        Raises IntegrityError when the predictions are not finite.
        """

    def compare(
        self, model: Predictions, baseline: Predictions, rows: TokenRows, batch_size: int, seed: int
    ) -> Comparison:
        """Return how `model` differs from `baseline`. Raises IntegrityError when predictions are not finite."""

    def output(self, model: PreTrainedModel, tokens: Tensor, mask: Tensor) -> Tensor:
        """Run `model` on token rows (n, S): logits (n, S, V) or (n, V), or embeddings (n, V)."""

    def divergence(self, output: Tensor, dense: Tensor, rows: Tensor) -> Tensor:
        """Return how far each prediction is from the dense model's, (p,) float64, in the task's unit.

        Args:
            output, dense: what `output` returned of a model and of the dense one.
            rows: (n, S) calibration rows.
        """

    def losses_in(self, rows: Tensor) -> int:
        """Return how many losses `loss` sums over calibration rows (n, S): a price is in nats for each.

        Raises InputError where there are none.
        """

    def loss(self, output: Tensor, rows: Tensor, draw: torch.Generator) -> Tensor:
        """Return the summed loss whose gradient prices removals.

        Args:
            output: what `output` returned.
            rows: (n, S) calibration rows.
            draw: on the CPU; of labels that are drawn.
        """


def compared(
    task: Task,
    rows: TokenRows,
    difference: np.ndarray,
    metrics: Mapping[str, float],
    seed: int,
    candidate: Quality | None = None,
    baseline: Quality | None = None,
) -> Comparison:
    """Return the comparison with its interval: over documents, or over windows where there are too few of them."""
    scored = task.scored(rows)
    unit = "document" if rows.documents >= MINIMUM_DOCUMENTS else "window"
    units = rows.document if unit == "document" else rows.row
    sums, counts = np.bincount(units, difference), np.bincount(units, scored)
    return Comparison(
        task=task.name,
        unit=task.unit,
        documents=rows.documents,
        candidate=candidate,
        baseline=baseline,
        difference=difference,
        scored=scored,
        loss_delta=bootstrap_mean(sums[counts > 0], counts[counts > 0], unit, seed),
        metrics=metrics,
    )


def batches(rows: TokenRows, batch_size: int, title: str) -> Iterator[tuple[list[int], Tensor]]:
    """Yield (row indices, tokens (n, S)), rows of one length together so that none is padded."""
    by_length: dict[int, list[int]] = {}
    for index, row in enumerate(rows.rows):
        by_length.setdefault(len(row), []).append(index)
    with Progress(len(rows.rows), title, "window") as bar:
        for length in sorted(by_length, reverse=True):
            indices = by_length[length]
            for start in range(0, len(indices), batch_size):
                batch = indices[start : start + batch_size]
                yield batch, torch.stack([rows.rows[index] for index in batch])
                bar.update(len(batch))


def parts(size: int, *values: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield `values`, (n, P, …) each, as parts (p, …) whose predictions of `size` values fit into memory."""
    positions = max(1, MAXIMUM_VALUES // size)
    return zip(*(value.flatten(0, 1).split(positions) for value in values), strict=True)


def of_texts(task: Task, model: PreTrainedModel, size: int) -> Predictions:
    """Return the predictions of a task that has one for each row: states are the predictions themselves."""

    def states(_: list[int], tokens: Tensor) -> Tensor:
        fed = tokens.to(model.device)
        return task.output(model, fed, torch.ones_like(fed))[:, None]

    return Predictions(states, lambda found: found, size)


def head_of(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """What `model` does with its last hidden states, without the rest of it: (p, H) to logits (p, V).

    It is the model's own forward with a base model that passes on what it is given. So whatever a family does beside
    the product with the output matrix (scale the logits, cap them, transform) is done, too.
    """
    head = copy.copy(model)  # of the module alone: its parts are shared
    head._modules = {**model._modules, model.base_model_prefix: _Passing()}

    def logits(hidden: Tensor) -> Tensor:
        found: Tensor = head(inputs_embeds=hidden[None]).logits
        return found[0]

    return logits


@dataclass
class _Passed(BaseModelOutputWithPastAndCrossAttentions):
    router_logits: tuple[Tensor, ...] | None = None  # which heads of models with experts ask for


class _Passing(nn.Module):
    """Stands for a base model whose last hidden states are known."""

    @property
    def decoder(self) -> nn.Module:
        """Itself: some models call the decoder inside their base model."""
        return self

    def forward(self, *_: object, inputs_embeds: Tensor, **__: object) -> _Passed:
        return _Passed(last_hidden_state=inputs_embeds)
