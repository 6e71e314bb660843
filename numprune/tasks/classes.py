"""Class distributions of one input each, a text or an image: differences from labels, and between two models."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from numprune.corpus import TokenRows
from numprune.errors import InputError, IntegrityError
from numprune.paired import paired_accuracy
from numprune.tasks import language
from numprune.tasks.task import Comparison, Predictions, Quality, Task, batches, compared, of_inputs

_TOP = 5


class ClassTask(Task, Protocol):
    """What all tasks share whose predictions are distributions over classes, one for each row.

    With labels, the loss is their NLL; without labels, it is the KL divergence from the dense model's distribution.

    Attributes:
        item: what a row is: "text" or "image".
    """

    item: ClassVar[str]
    generates: ClassVar[bool] = False
    prompted: ClassVar[bool] = False
    pooled: ClassVar[bool] = True

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
        return _quality(_distributions(model, rows, batch_size, keep), rows)

    def compare(
        self, model: Predictions, baseline: Predictions, rows: TokenRows, batch_size: int, seed: int
    ) -> Comparison:
        return _compare(self, model, baseline, rows, batch_size, seed)

    def divergence(self, output: Tensor, dense: Tensor, rows: Tensor) -> Tensor:
        return language.logits_divergence(output, dense)

    def losses_in(self, rows: Tensor) -> int:
        return len(rows)

    def loss(self, output: Tensor, rows: Tensor, draw: torch.Generator) -> Tensor:
        """The NLL of classes drawn from the model's own distributions: E[g g^T] is its Fisher matrix."""
        labels = language.draw_labels(output.float().log_softmax(-1), draw)
        return nn.functional.cross_entropy(output.float(), labels, reduction="sum")

    def skip(self, rows: Tensor, hidden_size: int, draw: torch.Generator) -> None:
        language.skip_labels(len(rows), draw)


def label_of(classes: Mapping[str, int], name: str, label: object) -> int:
    """Return the index of the class that the input `name` is labelled with, by name or index. Raises InputError."""
    if label is None:
        raise InputError(f"{name}: has no label, but others do; label all of them or none")
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(classes):
        return label
    if isinstance(label, str) and label in classes:
        return classes[label]
    known = ", ".join(list(classes)[:12])
    raise InputError(f"{name}: label {str(label)[:80]!r} is not a class of the model; its classes are {known}")


def _compare(
    task: ClassTask, model: Predictions, baseline: Predictions, rows: TokenRows, batch_size: int, seed: int
) -> Comparison:
    """Compare KL(baseline || model), the most probable class and, with labels, NLL and accuracy.

    The arguments are those of `Task.compare`.
    """
    if model.size != baseline.size:
        raise InputError(f"models differ in their number of classes: {model.size} and {baseline.size} (baseline)")
    ours, theirs = (_distributions(one, rows, batch_size) for one in (model, baseline))
    kl = language.kl_divergence(ours, theirs).numpy()
    metrics = {
        f"kl_nats_per_{task.item}": float(kl.mean()),
        "top1_agreement": float((ours.argmax(-1) == theirs.argmax(-1)).double().mean()),
    }
    classes = ours.argmax(-1).numpy(), theirs.argmax(-1).numpy()
    candidate, dense = _quality(ours, rows), _quality(theirs, rows)
    if candidate is None or dense is None:
        return replace(compared(task, rows, kl, metrics, seed), classes=classes)
    labels = _labels(rows).numpy()
    accuracy = paired_accuracy(*(found == labels for found in reversed(classes)))
    found = compared(task, rows, candidate.nll - dense.nll, metrics, seed, candidate, dense)
    return replace(found, classes=classes, accuracy=accuracy)


def _distributions(
    model: Predictions,
    rows: TokenRows,
    batch_size: int,
    keep: Callable[[list[int], Tensor], None] | None = None,
) -> Tensor:
    """Return the log-probabilities (rows, V) of all rows, float64 on the CPU."""
    found = torch.zeros(len(rows.rows), model.size, dtype=torch.float64)
    for index, inputs in batches(rows, batch_size, "evaluate"):
        states = model.states(index, inputs)
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
    labels = _labels(rows)
    nll = -found.gather(-1, labels[:, None])[:, 0].numpy()
    accuracy = float((found.argmax(-1) == labels).double().mean())
    top5 = None
    if found.shape[-1] > _TOP:
        top5 = float((found.topk(_TOP).indices == labels[:, None]).any(-1).double().mean())
    return Quality(nll, np.ones(len(nll), dtype=np.int64), accuracy, top5)


def _labels(rows: TokenRows) -> Tensor:
    assert rows.labels is not None
    return torch.tensor([rows.labels[document] for document in rows.document])
