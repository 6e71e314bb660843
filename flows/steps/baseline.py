"""A baseline on held-out text, scored once for all candidates that are compared with it.

What is kept is its last hidden states in float32, which its head turns into the same logits again: 4 bytes for each
token and hidden channel, where logits need them for each word of the vocabulary. A candidate's figures do not depend on
whether the baseline was scored just now; in 16 bits they would.
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
from numprune.export.checkpoint import load
from numprune.flows.names import BUILT_IN
from numprune.flows.steps.text import load_heldout
from numprune.generation import PROMPTS, generate
from numprune.quality import Distributions, Quality, evaluate

_HIDDEN = "hidden.f32"  # (scored tokens, H), row-major


def make_baseline(
    out: Path, *, model: Path, rows: Path, rows_digest: str, prompts: str | list[str], device: str
) -> dict[str, Any]:
    """Stage: the baseline's hidden states on the held-out rows, its NLL, and what it generates from the prompts."""
    loaded, tokenizer = load(model)
    return score(out, loaded.to(device), tokenizer, load_heldout(rows, rows_digest), prompts_of(prompts))


def score(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: TokenRows,
    prompts: Sequence[str] = (),
) -> dict[str, Any]:
    """Write the hidden states of `model` on `rows` into `folder`; return its figures and generations as plain JSON.

    Raises InputError, IntegrityError as `quality.evaluate` and `generation.generate` do.
    """
    generations = generate(model, tokenizer, prompts)
    starts = _starts(rows)
    with (folder / _HIDDEN).open("wb") as file:  # not mapped: a full disk would end the process without a word

        def keep(index: list[int], hidden: Tensor) -> None:
            for row, states in zip(index, hidden.float().cpu().numpy(), strict=True):
                file.seek(int(starts[row]) * states.shape[1] * states.itemsize)
                file.write(states.tobytes())

        quality = evaluate(model, rows, keep=keep)
    return {**side(quality), "generations": [dataclasses.asdict(one) for one in generations]}


def scored(
    folder: Path, rows: TokenRows, head: Callable[[Tensor], Tensor], vocabulary: int, device: torch.device
) -> Distributions:
    """What `score` wrote into `folder`, of the same rows. `head`: the scored model's (see `quality.head_of`)."""
    starts = _starts(rows)
    kept = np.memmap(folder / _HIDDEN, dtype=np.float32, mode="r").reshape(int(starts[-1]), -1)

    def hidden(index: list[int], tokens: Tensor) -> Tensor:
        scored = tokens.shape[1] - 1
        states = np.stack([kept[starts[row] : starts[row] + scored] for row in index])
        return torch.from_numpy(states).to(device)

    return Distributions(hidden, head, vocabulary)


def prompts_of(prompts: str | Sequence[str]) -> Sequence[str]:
    """A recipe's prompts."""
    return PROMPTS if prompts == BUILT_IN else list(prompts)


def side(quality: Quality) -> dict[str, Any]:
    return {"nll_nats_per_token": quality.nll_nats_per_token, "perplexity": quality.perplexity}


def _starts(rows: TokenRows) -> Any:
    """(windows + 1,) where each window's scored tokens begin."""
    return np.cumsum([0, *(len(row) - 1 for row in rows.rows)])
