"""Sequence classification: differences of class distributions from the dense model's, and from labels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from numprune.corpus import Pack, TokenRows
from numprune.documents import Document
from numprune.tasks import classes
from numprune.tasks.reading import encoder_rows, text_rows
from numprune.tasks.task import TaskName
from numprune.units import LOSS_UNITS


@dataclass(frozen=True)
class Classification(classes.ClassTask):
    """A classifier of texts into one class each (numprune.tasks.Task).

    Attributes:
        classes: name of each class -> its index.
    """

    classes: Mapping[str, int]

    name: ClassVar[TaskName] = "classification"
    unit: ClassVar[str] = LOSS_UNITS["classification"]
    item: ClassVar[str] = "text"

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

    def output(self, model: PreTrainedModel, tokens: Tensor, mask: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=tokens, attention_mask=mask).logits
        return logits
