"""Quality on held-out text: a model's loss, and its change by pruning with confidence bounds over documents.

Perplexity is exp of the mean NLL over consecutive windows of the sequence length, without overlap; the first token of a
window is not scored.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from numprune.anatomy import context_of, image_shape
from numprune.corpus import TokenRows
from numprune.errors import InputError
from numprune.tasks import CAUSAL, Comparison, Predictions, Quality, Task


@torch.inference_mode()
def evaluate(
    model: PreTrainedModel,
    rows: TokenRows,
    task: Task = CAUSAL,
    batch_size: int = 8,
    keep: Callable[[list[int], Tensor], None] | None = None,
) -> Quality | None:
    """Return the NLL of `model` on `rows`, or None if the task has none without a baseline (`Task.has_loss`).

    Args:
        task: that reads `rows`, and that the model is for.
        keep: called with each batch's row indices and states, for later use as `Predictions.states`.

    Raises:
        InputError: a token is outside the vocabulary, or a row longer than the model's context.
        IntegrityError: the model's predictions are not finite.
    """
    check_rows_fit(model, rows)
    return task.evaluate(task.predictions(model), rows, batch_size, keep)


def compare(
    model: PreTrainedModel,
    baseline: PreTrainedModel,
    rows: TokenRows,
    task: Task = CAUSAL,
    *,
    batch_size: int = 8,
    seed: int = 0,
) -> Comparison:
    """Compare `model` with `baseline` on `rows`. Raises like `evaluate`."""
    check_rows_fit(baseline, rows)
    return compare_with(model, task.predictions(baseline), rows, task, batch_size=batch_size, seed=seed)


@torch.inference_mode()
def compare_with(
    model: PreTrainedModel,
    baseline: Predictions,
    rows: TokenRows,
    task: Task = CAUSAL,
    *,
    batch_size: int = 8,
    seed: int = 0,
) -> Comparison:
    """Like `compare`, with a baseline whose states on `rows` are already known."""
    check_rows_fit(model, rows)
    return compare_predictions(task.predictions(model), baseline, rows, task, batch_size=batch_size, seed=seed)


@torch.inference_mode()
def compare_predictions(
    model: Predictions,
    baseline: Predictions,
    rows: TokenRows,
    task: Task = CAUSAL,
    *,
    batch_size: int = 8,
    seed: int = 0,
) -> Comparison:
    """Like `compare`, with the states of both models on `rows` already known."""
    return task.compare(model, baseline, rows, batch_size, seed)


def check_rows_fit(model: PreTrainedModel, rows: TokenRows) -> None:
    """Raise InputError if a token is outside the vocabulary, a row is too long, or an image has another shape."""
    if rows.rows[0].dim() > 1:
        found, expected = tuple(rows.rows[0].shape), image_shape(model.config)
        if found != expected:
            raise InputError(f"the images have shape {list(found)}, but the model reads {list(expected)}")
        return
    largest = max(int(row.max()) for row in rows.rows)
    if largest >= model.config.vocab_size:
        raise InputError(
            f"token {largest} is outside the model's vocabulary of {model.config.vocab_size}: "
            "the tokenizer is not this model's"
        )
    longest = max(map(len, rows.rows))
    if longest > (context := context_of(model.config)):
        raise InputError(f"sequence length {longest} exceeds the model's context of {context}; use a shorter one")
