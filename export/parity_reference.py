"""The reference of parity.py: the rows to compare, each run alone by the checkpoint in PyTorch."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from numprune.anatomy import code_vocabulary, read_anatomy
from numprune.blocks import Anatomy
from numprune.budget import budget_of
from numprune.errors import InputError
from numprune.export import checkpoint
from numprune.export.prompts import TEXTS
from numprune.export.runtimes import Runtime
from numprune.export.runtimes.torch_eager import TorchRuntime

_BEYOND = 8  # tokens of a prompt beyond the window
# A prompt beyond a longer window, or of a larger model, takes minutes on a CPU.
_LONGEST_WINDOW, _MOST_FLOPS = 2048, 2e13


@dataclass(frozen=True)
class Row:
    """One prompt, run alone by the reference."""

    name: str  # of the prompt
    prompt: Tensor  # (S,)
    greedy: Tensor  # (steps,): the continuation
    logits: Tensor  # (S - first + steps, V): at the prompt's positions from `first`, then after each token of `greedy`
    first: int = 0


@dataclass(frozen=True)
class Case:
    """Rows that the candidate runs as one batch; `last_only`: of the prompts only the last position is compared."""

    batch_size: int
    padded: bool
    rows: tuple[int, ...]  # indices of the reference's rows
    last_only: bool = False


def window_of(anatomy: Anatomy) -> int | None:
    """Return the smallest attention window that is shorter than the context, if the model has one."""
    blocks = anatomy.of_kind("attention")
    windows = [window for block in blocks if block.units and (window := anatomy.window_of(block)) is not None]
    return min((window for window in windows if window < anatomy.context), default=None)


def run_reference(
    runtime: TorchRuntime,
    folder: Path,
    prompts: Tensor | None,
    batch_sizes: Sequence[int],
    prompt_length: int,
    decode_steps: int,
    longest: int | None,
) -> tuple[list[Case], list[Row], dict[str, Any]]:
    """Return the batches to run, and each row's result when run alone; `runtime` runs the checkpoint in `folder`.

    Without `prompts`, one more prompt is longer than the model's attention window, if it takes at most `longest` tokens
    with its continuation, and its work is bounded.
    """
    if not batch_sizes or min(batch_sizes) < 1:
        raise InputError(f"batch_sizes={list(batch_sizes)}: at least one, each at least 1")
    names, given = None, prompts is not None
    if prompts is None:
        names, prompts = _prompts(folder, runtime.vocabulary, max(batch_sizes), prompt_length)
    if prompts.dim() != 2 or len(prompts) < max(batch_sizes) or prompts.shape[1] < 2:
        raise InputError(
            f"prompts of shape {list(prompts.shape)}: at least {max(batch_sizes)} rows of at least 2 tokens are needed"
        )
    if prompts.shape[1] + decode_steps > runtime.context:
        raise InputError(
            f"prompts of {prompts.shape[1]} tokens and {decode_steps} steps exceed the model's "
            f"max_position_embeddings={runtime.context}"
        )
    cases: list[Case] = []
    alone: dict[tuple[int, int], int] = {}  # (prompt, its length) -> row
    for size in batch_sizes:
        for padded in (False, True) if size > 1 else (False,):
            lengths = _lengths(size, prompts.shape[1]) if padded else [prompts.shape[1]] * size
            rows = tuple(alone.setdefault(key, len(alone)) for key in zip(range(size), lengths, strict=True))
            cases.append(Case(size, padded, rows))
    names = names or [f"prompt {index}" for index in range(len(prompts))]
    rows_alone = [_run_alone(runtime, names[index], prompts[index, :length], decode_steps) for index, length in alone]
    if not given and (beyond := _beyond_window(folder, runtime, prompt_length, decode_steps, longest)) is not None:
        cases.append(Case(1, False, (len(rows_alone),), last_only=True))
        name = "random tokens beyond the window"
        rows_alone.append(_run_alone(runtime, name, beyond, decode_steps, last_only=True))
    return cases, rows_alone, runtime.describe()


def _beyond_window(
    folder: Path, runtime: TorchRuntime, prompt_length: int, decode_steps: int, longest: int | None
) -> Tensor | None:
    """Return a prompt (S,) that reaches beyond the window, or None: the others do, or it would take too long."""
    anatomy = read_anatomy(checkpoint.read_config(folder))
    window = window_of(anatomy)
    if window is None or window < prompt_length:
        return None
    length = window + _BEYOND
    fits = length + decode_steps <= min(runtime.context, longest or runtime.context)
    if not fits or window > _LONGEST_WINDOW or length * budget_of(anatomy).flops_per_token > _MOST_FLOPS:
        return None
    return torch.randint(runtime.vocabulary, (length,), generator=torch.Generator().manual_seed(1))


def _lengths(size: int, longest: int) -> list[int]:
    """Return the lengths of a ragged batch, from the whole prompt down to a single token."""
    return [longest - (longest - 1) * index // (size - 1) for index in range(size)]


def _prompts(folder: Path, vocabulary: int, rows: int, length: int) -> tuple[list[str], Tensor]:
    """Return names and tokens (rows, length), alternating between text and tokens that are rare in text.

    Those of an image generator are images of random codes instead.
    """
    generator = torch.Generator().manual_seed(0)
    if codes := code_vocabulary(checkpoint.read_config(folder)):
        starts = torch.randint(codes.codes, vocabulary, (rows, 1), generator=generator)
        images = torch.randint(codes.codes, (rows, length - 1), generator=generator)
        return ["random codes"] * rows, torch.cat([starts, images], 1)
    tokenizer = checkpoint.load_tokenizer(folder)
    texts = cycle(TEXTS.items())
    names, prompts = [], []
    for index in range(rows):
        if index % 2:
            names.append("random tokens")
            prompts.append(torch.randint(vocabulary, (length,), generator=generator))
        else:
            name, text = next(texts)
            names.append(name)
            prompts.append(torch.tensor([*islice(cycle(tokenizer.encode(text)), length)]))
    return names, torch.stack(prompts)


def _run_alone(runtime: Runtime, name: str, prompt: Tensor, decode_steps: int, *, last_only: bool = False) -> Row:
    logits = [runtime.prefill(prompt[None], last_only=last_only)[0]]
    greedy = []
    for _ in range(decode_steps):
        greedy.append(logits[-1][-1].argmax())
        logits.append(runtime.decode(greedy[-1].reshape(1, 1)))
    first = len(prompt) - 1 if last_only else 0
    return Row(name, prompt, torch.stack(greedy), torch.cat(logits).float(), first)
