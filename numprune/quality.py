"""Quality on held-out text: a model's loss, and what pruning changed, with an interval over documents.

Perplexity: the text's tokens in consecutive windows of the sequence length, no overlap, the first token of a window not
scored; exp of the mean NLL.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from numprune.anatomy import context_of
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
    """Return the NLL of `model` on `rows`; None unless it has one without a baseline (`Task.has_loss`).

    Args:
        task: that reads `rows`, and that the model is for.
        keep: is called with each batch's row indices and states, which `Predictions.states` can give back.

    Raises:
        InputError: a token is outside the vocabulary, or a row longer than the model's context.
        IntegrityError: the model gives predictions that are not finite.
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
    """Return how `model` differs from `baseline` on `rows`; raises as `evaluate` does."""
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
    """`compare` with a baseline whose states on `rows` are known already."""
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
    """`compare` where the states of both on `rows` are known already."""
    return task.compare(model, baseline, rows, batch_size, seed)


def check_rows_fit(model: PreTrainedModel, rows: TokenRows) -> None:
    """Raises InputError where the tokens cannot be this model's, or a row is longer than its context."""
    largest = max(int(row.max()) for row in rows.rows)
    if largest >= model.config.vocab_size:
        raise InputError(
            f"token {largest} is outside the model's vocabulary of {model.config.vocab_size}: "
            "the tokenizer is not this model's"
        )
    longest = max(map(len, rows.rows))
    if longest > (context := context_of(model.config)):
        raise InputError(f"sequence length {longest} exceeds the model's context of {context}; use a shorter one")
