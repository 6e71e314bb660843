"""Sequence classification: differences of class distributions from the dense model's, and from labels."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from numprune.corpus import Pack, TokenRows
from numprune.documents import Document
from numprune.errors import InputError, IntegrityError
from numprune.tasks import language
from numprune.tasks.reading import encoder_rows, text_rows
from numprune.tasks.task import Comparison, Predictions, Quality, TaskName, batches, compared, of_texts
from numprune.units import LOSS_UNITS


@dataclass(frozen=True)
class Classification:
    """A classifier of texts into one class each (numprune.tasks.Task).

    With labels, the loss is their NLL; without labels, it is the KL divergence from the dense model's distribution.

    Attributes:
        classes: name of each class -> its index.
    """

    classes: Mapping[str, int]

    name: ClassVar[TaskName] = "classification"
    unit: ClassVar[str] = LOSS_UNITS["classification"]
    generates: ClassVar[bool] = False
    pooled: ClassVar[bool] = True

    def calibration_rows(
        self, documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, length: int, pack: Pack = "auto"
    ) -> TokenRows:
        return encoder_rows(documents, tokenizer, length, pack)

    def heldout_rows(
        self, documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, length: int, pack: Pack = "auto"
    ) -> TokenRows:
        """Return the texts; of labelled ones only the first window, because a classifier truncates long texts."""
        rows = text_rows(documents, tokenizer, length, pack)
        if all(document.label is None for document in documents):
            return rows
        return replace(rows.first_of_each_document(), labels=[self._label(document) for document in documents])

    def _label(self, document: Document) -> int:
        label = document.label
        if label is None:
            raise InputError(f"{document.name}: has no label, but other texts do; label all of them or none")
        if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(self.classes):
            return label
        if isinstance(label, str) and label in self.classes:
            return self.classes[label]
        known = ", ".join(list(self.classes)[:12])
        raise InputError(
            f"{document.name}: label {str(label)[:80]!r} is not a class of the model; its classes are {known}"
        )

    def predictions_in(self, length: int) -> int:
        return 1

    def scored(self, rows: TokenRows) -> np.ndarray:
        return np.ones(len(rows.rows), dtype=np.int64)

    def has_loss(self, rows: TokenRows) -> bool:
        return rows.labels is not None

    def predictions(self, model: PreTrainedModel) -> Predictions:
        return of_texts(self, model, model.config.num_labels)

    def evaluate(
        self,
        model: Predictions,
        rows: TokenRows,
        batch_size: int,
        keep: Callable[[list[int], Tensor], None] | None = None,
    ) -> Quality | None:
        found = _distributions(model, rows, batch_size, keep)
        return _quality(found, rows)

    def compare(
        self, model: Predictions, baseline: Predictions, rows: TokenRows, batch_size: int, seed: int
    ) -> Comparison:
        if model.size != baseline.size:
            raise InputError(f"models differ in their number of classes: {model.size} and {baseline.size} (baseline)")
        ours, theirs = (_distributions(one, rows, batch_size) for one in (model, baseline))
        kl = language.kl_divergence(ours, theirs).numpy()
        metrics = {
            "kl_nats_per_text": float(kl.mean()),
            "top1_agreement": float((ours.argmax(-1) == theirs.argmax(-1)).double().mean()),
        }
        candidate, dense = _quality(ours, rows), _quality(theirs, rows)
        if candidate is None or dense is None:
            return compared(self, rows, kl, metrics, seed)
        assert candidate.accuracy is not None
        assert dense.accuracy is not None
        metrics |= {"accuracy": candidate.accuracy, "baseline_accuracy": dense.accuracy}
        return compared(self, rows, candidate.nll - dense.nll, metrics, seed, candidate, dense)

    def output(self, model: PreTrainedModel, tokens: Tensor, mask: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=tokens, attention_mask=mask).logits
        return logits

    def divergence(self, output: Tensor, dense: Tensor, rows: Tensor) -> Tensor:
        return language.logits_divergence(output, dense)

    def losses_in(self, rows: Tensor) -> int:
        return len(rows)

    def loss(self, output: Tensor, rows: Tensor, draw: torch.Generator) -> Tensor:
        """The NLL of classes drawn from the model's own distributions: E[g g^T] is its Fisher matrix."""
        labels = language.draw_labels(output.float().log_softmax(-1), draw)
        return nn.functional.cross_entropy(output.float(), labels, reduction="sum")


def _distributions(
    model: Predictions,
    rows: TokenRows,
    batch_size: int,
    keep: Callable[[list[int], Tensor], None] | None = None,
) -> Tensor:
    """Return the log-probabilities (rows, V) of all rows, float64 on the CPU."""
    found = torch.zeros(len(rows.rows), model.size, dtype=torch.float64)
    for index, tokens in batches(rows, batch_size, "evaluate"):
        states = model.states(index, tokens)
        if keep is not None:
            keep(index, states)
        found[index] = states[:, 0].double().log_softmax(-1).cpu()
    if not torch.isfinite(found).all():
        raise IntegrityError("the model's probabilities are not finite; its weights are damaged or overflow")
    return found


def _quality(found: Tensor, rows: TokenRows) -> Quality | None:
    """Return the NLL of the labels by log-probabilities (rows, V), if there are labels."""
    if rows.labels is None:
        return None
    labels = torch.tensor([rows.labels[document] for document in rows.document])
    nll = -found.gather(-1, labels[:, None])[:, 0].numpy()
    accuracy = float((found.argmax(-1) == labels).double().mean())
    return Quality(nll, np.ones(len(nll), dtype=np.int64), accuracy)
