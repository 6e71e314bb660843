"""Image classification: differences of class distributions from the dense model's, and from labels."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from numprune.corpus import TokenRows
from numprune.images import Processor, image_rows
from numprune.pictures import Picture
from numprune.tasks import classes, language
from numprune.tasks.task import Comparison, Predictions, Quality, TaskName, of_inputs
from numprune.units import LOSS_UNITS


@dataclass(frozen=True)
class ImageClassification:
    """A classifier of images into one class each (numprune.tasks.Task).

    With labels, the loss is their NLL; without labels, it is the KL divergence from the dense model's distribution.

    Attributes:
        classes: name of each class -> its index.
        processor: turns images into the pixel values that the model reads.
    """

    classes: Mapping[str, int]
    processor: Processor

    name: ClassVar[TaskName] = "image-classification"
    unit: ClassVar[str] = LOSS_UNITS["image-classification"]
    item: ClassVar[str] = "image"
    generates: ClassVar[bool] = False
    prompted: ClassVar[bool] = False
    pooled: ClassVar[bool] = True

    def rows(self, pictures: Sequence[Picture], *, labelled: bool = False) -> TokenRows:
        """Return each picture as a row of pixel values, with labels if `labelled` and all pictures have one.

        Raises InputError: a picture cannot be read, or has an unknown label, or only some have one.
        """
        return image_rows(pictures, self.processor, self.labels(pictures) if labelled else None)

    def labels(self, pictures: Sequence[Picture]) -> list[int] | None:
        """Return the class of each picture, or None if no picture has one. Raises InputError."""
        if all(picture.label is None for picture in pictures):
            return None
        return [classes.label_of(self.classes, picture.name, picture.label) for picture in pictures]

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
        """Run `model` on images (n, C, height, width); nothing is masked."""
        logits: Tensor = model(pixel_values=tokens).logits
        return logits

    def divergence(self, output: Tensor, dense: Tensor, rows: Tensor) -> Tensor:
        return language.logits_divergence(output, dense)

    def losses_in(self, rows: Tensor) -> int:
        return len(rows)

    def loss(self, output: Tensor, rows: Tensor, draw: torch.Generator) -> Tensor:
        """The NLL of classes drawn from the model's own distributions: E[g g^T] is its Fisher matrix."""
        labels = language.draw_labels(output.float().log_softmax(-1), draw)
        return nn.functional.cross_entropy(output.float(), labels, reduction="sum")
