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
from numprune.tasks import classes, language
from numprune.tasks.reading import encoder_rows, text_rows
from numprune.tasks.task import Comparison, Predictions, Quality, TaskName, of_inputs
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
    item: ClassVar[str] = "text"
    generates: ClassVar[bool] = False
    prompted: ClassVar[bool] = False
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
        labels = [classes.label_of(self.classes, document.name, document.label) for document in documents]
        return replace(rows.first_of_each_document(), labels=labels)

    def predictions_in(self, length: int) -> int:
        return 1

    def scored(self, rows: TokenRows) -> np.ndarray:
        return np.ones(len(rows.rows), dtype=np.int64)

    def has_loss(self, rows: TokenRows) -> bool:
        return rows.labels is not None

    def predictions(self, model: PreTrainedModel) -> Predictions:
        return of_inputs(self, model, model.config.num_labels)

    def evaluate(
        self,
        model: Predictions,
        rows: TokenRows,
        batch_size: int,
        keep: Callable[[list[int], Tensor], None] | None = None,
    ) -> Quality | None:
        return classes.evaluate(model, rows, batch_size, keep)

    def compare(
        self, model: Predictions, baseline: Predictions, rows: TokenRows, batch_size: int, seed: int
    ) -> Comparison:
        return classes.compare(self, model, baseline, rows, batch_size, seed)

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
