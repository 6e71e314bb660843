"""Image classification: differences of class distributions from the dense model's, and from labels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from numprune.corpus import TokenRows
from numprune.images import Processor, image_rows
from numprune.pictures import Picture
from numprune.tasks import classes
from numprune.tasks.task import TaskName
from numprune.units import LOSS_UNITS


@dataclass(frozen=True)
class ImageClassification(classes.ClassTask):
    """A classifier of images into one class each (numprune.tasks.Task).

    Attributes:
        classes: name of each class -> its index.
        processor: turns images into the pixel values that the model reads.
    """

    classes: Mapping[str, int]
    processor: Processor

    name: ClassVar[TaskName] = "image-classification"
    unit: ClassVar[str] = LOSS_UNITS["image-classification"]
    item: ClassVar[str] = "image"

    def rows(self, pictures: Sequence[Picture], *, judged: bool = False) -> TokenRows:
        """Return each picture as a row of pixel values; if `judged`, those to judge a model on.

        They have labels if all pictures have one, and copies of an image in one class count once: intervals are over
        independent images.

        Raises InputError: a picture cannot be read, or has an unknown label, or only some have one.
        """
        return image_rows(pictures, self.processor, self.labels(pictures) if judged else None, distinct=judged)

    def labels(self, pictures: Sequence[Picture]) -> list[int] | None:
        """Return the class of each picture, or None if no picture has one. Raises InputError."""
        if all(picture.label is None for picture in pictures):
            return None
        return [classes.label_of(self.classes, picture.name, picture.label) for picture in pictures]

    def output(self, model: PreTrainedModel, tokens: Tensor, mask: Tensor) -> Tensor:
        """Run `model` on images (n, C, height, width); nothing is masked."""
        logits: Tensor = model(pixel_values=tokens).logits
        return logits
