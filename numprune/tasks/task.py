"""The interface of tasks: reading text or images as rows, predictions, and losses.

A row's *predictions* are its next-token distributions (causal LM), those of its masked tokens (masked LM), its class
distribution (classification) or its sentence embedding. P is their number per row, V the size of each, and F the size
of the *state* from which the model's head computes a prediction.
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
from numprune.paired import PairedAccuracy
from numprune.progress import Progress

# Fewer documents give no useful bounds. Windows are resampled instead, whose bounds only apply to this text, because
# the windows of one document are similar.
MINIMUM_DOCUMENTS = 5

# Predictions are computed for a few positions at a time, so that memory depends neither on the batch nor on the
# vocabulary: 2^23 values are 32 MiB. A batch of 8 rows of 512 tokens has 805 MB of them with a vocabulary of 49,152.
MAXIMUM_VALUES = 1 << 23


@dataclass(frozen=True)
class Predictions:
    """A model's predictions of token rows, as the functions that compute them.

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
    """NLL of one model, by span: the part of a row from one document (if rows are not packed, the whole row).

    Attributes:
        nll: (spans,) summed NLL in nats, float64.
        scored: (spans,) number of scored predictions: tokens, masked tokens or texts.
        accuracy: share of texts or images whose most probable class is their label; None if the task has no labels.
        top5_accuracy: of those whose label is among the five most probable of more than five classes.
    """

    nll: np.ndarray
    scored: np.ndarray
    accuracy: float | None = None
    top5_accuracy: float | None = None

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
        unit: of the loss, like "nats/token".
        documents: number of documents.
        candidate, baseline: their NLL; None if the task has no NLL of a single model.
        difference: (spans,) the candidate's loss minus the baseline's, summed, float64.
        scored: (spans,) number of predictions in each sum.
        loss_delta: mean difference, paired by prediction.
        metrics: further figures of the task by name.
        accuracy: of both models, paired; None without labels.
        classes: (rows,) most probable class of each row by the candidate and by the baseline; None if it has none.
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
    accuracy: PairedAccuracy | None = None
    classes: tuple[np.ndarray, np.ndarray] | None = None


class Task(Protocol):
    """The interface of a task. Rows are token rows (n, S), or images (n, C, height, width).

    Attributes:
        name: of the task.
        unit: of its loss.
        generates: it continues a row token by token, with a KV cache.
        prompted: it continues text.
        pooled: a row has one loss, of all its tokens together.
    """

    name: ClassVar[TaskName]
    unit: ClassVar[str]
    generates: ClassVar[bool]
    prompted: ClassVar[bool]
    pooled: ClassVar[bool]

    def predictions_in(self, length: int) -> int:
        """Return P for a row of `length` tokens."""

    def scored(self, rows: TokenRows) -> np.ndarray:
        """Return how many predictions each span has, (spans,) int64."""

    def has_loss(self, rows: TokenRows) -> bool:
        """Return whether a single model has an NLL on these rows, not only a difference from a baseline."""

    def predictions(self, model: PreTrainedModel) -> Predictions:
        """Return the predictions of a model in memory."""

    def evaluate(
        self,
        model: Predictions,
        rows: TokenRows,
        batch_size: int,
        keep: Callable[[list[int], Tensor], None] | None = None,
    ) -> Quality | None:
        """Return the NLL of `model`, or None without `has_loss`. `keep`: as in quality.evaluate.

        Raises IntegrityError if predictions are not finite.
        """

    def compare(
        self, model: Predictions, baseline: Predictions, rows: TokenRows, batch_size: int, seed: int
    ) -> Comparison:
        """Compare `model` with `baseline`. Raises IntegrityError if predictions are not finite."""

    def output(self, model: PreTrainedModel, tokens: Tensor, mask: Tensor) -> Tensor:
        """Run `model` on rows: logits (n, S, V) or (n, V), or embeddings (n, V)."""

    def divergence(self, output: Tensor, dense: Tensor, rows: Tensor) -> Tensor:
        """Return how far each prediction is from the dense model's, (p,) float64, in the task's unit.

        Args:
            output, dense: returned by `output` for a model and for the dense one.
            rows: the calibration rows.
        """

    def losses_in(self, rows: Tensor) -> int:
        """Return the number of losses that `loss` sums over calibration rows; prices are per loss.

        Raises InputError if there are none.
        """

    def loss(self, output: Tensor, rows: Tensor, draw: torch.Generator) -> Tensor:
        """Return the summed loss whose gradient prices removals.

        Args:
            output: returned by `output`.
            rows: the calibration rows.
            draw: on the CPU, for drawing labels.
        """

    def skip(self, rows: Tensor, hidden_size: int, draw: torch.Generator) -> None:
        """Draw what `loss` would draw for these rows, one by one; `hidden_size`: of the model."""


class TextTask(Task, Protocol):
    """A task of a model that reads text."""

    def calibration_rows(
        self, documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, length: int, pack: Pack = "auto"
    ) -> TokenRows:
        """Return the text as windows of at most `length` tokens, ready as model input. Raises InputError."""

    def heldout_rows(
        self, documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, length: int, pack: Pack = "auto"
    ) -> TokenRows:
        """Return the text as rows of at most `length` tokens for `evaluate` and `compare`. Raises InputError."""


def compared(
    task: Task,
    rows: TokenRows,
    difference: np.ndarray,
    metrics: Mapping[str, float],
    seed: int,
    candidate: Quality | None = None,
    baseline: Quality | None = None,
) -> Comparison:
    """Return the comparison with its interval: over documents, or over windows if there are too few documents."""
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
    """Yield row indices and the rows themselves, rows of one length together so that none is padded."""
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


def of_inputs(task: Task, model: PreTrainedModel, size: int) -> Predictions:
    """Return the predictions of a task with one prediction per row: the states are the predictions themselves."""

    def states(_: list[int], tokens: Tensor) -> Tensor:
        fed = tokens.to(model.device)
        return task.output(model, fed, torch.ones_like(fed))[:, None]

    return Predictions(states, lambda found: found, size)


def head_of(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """Return the function from the last hidden states of `model`, (p, H), to logits (p, V).

    It is the model's own forward pass with a base model that returns its input, so everything that a family does
    besides the product with the output matrix (scaling, capping or transforming logits) is included.
    """
    head = copy.copy(model)  # a shallow copy: its parts are shared
    head._modules = {**model._modules, model.base_model_prefix: _Passing()}

    def logits(hidden: Tensor) -> Tensor:
        found: Tensor = head(inputs_embeds=hidden[None]).logits
        return found[0]

    return logits


@dataclass
class _Passed(BaseModelOutputWithPastAndCrossAttentions):
    router_logits: tuple[Tensor, ...] | None = None  # read by the heads of models with experts


class _Passing(nn.Module):
    """Replaces a base model whose last hidden states are known."""

    @property
    def decoder(self) -> nn.Module:
        """Itself: some models call the decoder inside their base model."""
        return self

    def forward(self, *_: object, inputs_embeds: Tensor, **__: object) -> _Passed:
        return _Passed(last_hidden_state=inputs_embeds)
