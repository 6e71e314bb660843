"""A baseline on held-out text, scored once for all candidates.

It stores states in float32, from which the head computes the same predictions again: for a language model the last
hidden states, 4 bytes per token and hidden channel, whereas logits need 4 bytes per vocabulary entry. A candidate's
figures do not depend on when the baseline was scored; in 16 bits they would.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from numprune.corpus import TokenRows
from numprune.flows.names import BUILT_IN
from numprune.flows.steps.results import BaselineScores
from numprune.generation import PROMPTS, generate
from numprune.quality import evaluate
from numprune.tasks import CAUSAL, Predictions, Quality, Task

_STATES = "states.f32"  # (predictions, F), row-major


def score(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    rows: TokenRows,
    prompts: Sequence[str] = (),
    task: Task = CAUSAL,
) -> BaselineScores:
    """Write the states of `model` on `rows` into `folder`; return its figures and generations.

    `tokenizer`: None if the model reads images.

    Raises InputError, IntegrityError as `quality.evaluate` and `generation.generate` do.
    """
    generations = generate(model, tokenizer, prompts) if tokenizer is not None and task.prompted else []
    quality = keep_states(folder, model, rows, task)
    accuracy = quality.accuracy if quality else None
    return BaselineScores([dataclasses.asdict(one) for one in generations], **side(quality), accuracy=accuracy)


def keep_states(folder: Path, model: PreTrainedModel, rows: TokenRows, task: Task = CAUSAL) -> Quality | None:
    """Write the states of `model` on `rows` into `folder`, for `scored`; return what `quality.evaluate` does."""
    starts = _starts(rows, task)
    with (folder / _STATES).open("wb") as file:  # not mapped: a full disk would kill the process without a message

        def keep(index: list[int], states: Tensor) -> None:
            for row, of_row in zip(index, states.float().cpu().numpy(), strict=True):
                file.seek(int(starts[row]) * of_row.shape[1] * of_row.itemsize)
                file.write(of_row.tobytes())

        return evaluate(model, rows, task, keep=keep)


def scored(
    folder: Path,
    rows: TokenRows,
    head: Callable[[Tensor], Tensor],
    size: int,
    device: torch.device,
    task: Task = CAUSAL,
) -> Predictions:
    """What `score` or `keep_states` wrote into `folder`, of the same rows.

    `head`, `size`: of the scored model's predictions.
    """
    starts = _starts(rows, task)
    kept = np.memmap(folder / _STATES, dtype=np.float32, mode="r").reshape(int(starts[-1]), -1)

    def states(index: list[int], _: Tensor) -> Tensor:
        found = np.stack([kept[starts[row] : starts[row + 1]] for row in index])
        return torch.from_numpy(found).to(device)

    return Predictions(states, head, size)


def prompts_of(prompts: str | Sequence[str]) -> Sequence[str]:
    """A recipe's prompts."""
    return PROMPTS if prompts == BUILT_IN else list(prompts)


def side(quality: Quality | None) -> dict[str, Any]:
    if quality is None:  # the task has no loss without a baseline
        return {}
    return {"nll_nats_per_token": quality.mean_nll, "perplexity": quality.perplexity}


def _starts(rows: TokenRows, task: Task) -> Any:
    """(rows + 1,) start of each row's predictions."""
    return np.cumsum([0, *(task.predictions_in(len(row)) for row in rows.rows)])
