"""Proof that a runtime computes what the checkpoint computes: prefill and cached decoding, batched, padded; it blocks.

The reference runs every row alone and without padding in PyTorch, float32. The candidate runs the same rows in batches,
also ragged ones padded on the left, and is fed the reference's greedy tokens, so each position has one right answer.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from numprune.errors import InputError, ParityError
from numprune.export import manifest
from numprune.export.runtimes import Runtime, open_runtime
from numprune.export.runtimes.torch_eager import TorchRuntime

TOLERANCE = 1e-3  # of a logit; float32 runtimes differ by 1e-6 … 1e-4, wrong ones by far more
LEAST_DECODE_STEPS = 32


@dataclass(frozen=True)
class Row:
    """One prompt alone in the reference."""

    prompt: Tensor  # (S,)
    greedy: Tensor  # (steps,): the tokens it goes on with
    logits: Tensor  # (S + steps, V): at each prompt position, then after each token of `greedy`


@dataclass(frozen=True)
class Case:
    """Rows that the candidate runs together."""

    batch_size: int
    padded: bool
    rows: tuple[int, ...]  # into the reference's rows


@dataclass(frozen=True)
class Position:
    """One logit, and where it is."""

    batch_size: int
    padded: bool
    row: int  # in the batch
    phase: str  # "prefill" or "decode"
    position: int  # of the row's own tokens (padding not counted) at prefill, step at decode
    token_id: int
    reference: float
    candidate: float

    def __str__(self) -> str:
        where = f"{self.phase} {'position' if self.phase == 'prefill' else 'step'} {self.position}"
        padded = ", left-padded" if self.padded else ""
        return (
            f"batch size {self.batch_size}{padded}, row {self.row}, {where}, token {self.token_id}: "
            f"reference {self.reference:.6g}, candidate {self.candidate:.6g}"
        )


@dataclass
class _Errors:
    """What the comparison of all positions adds up to."""

    logit_max: float = -1.0
    logit_sum: float = 0.0
    logprob_max: float = 0.0
    logprob_sum: float = 0.0
    values: int = 0
    positions: int = 0
    matches: int = 0
    worst: Position | None = None


def check(
    reference: Path,
    candidate: Path,
    runtime: str,
    *,
    prompts: Tensor | None = None,
    batch_sizes: Sequence[int] = (1, 3),
    prompt_length: int = 24,
    decode_steps: int = LEAST_DECODE_STEPS,
    tolerance: float = TOLERANCE,
    device: str = "auto",
    threads: int | None = None,
) -> dict[str, Any]:
    """Compare `candidate` in `runtime` with the checkpoint `reference`, logit by logit.

    Args:
        reference: a checkpoint folder.
        candidate: what the runtime runs; its digests are verified first where it has a manifest.
        runtime: a name that `open_runtime` knows.
        prompts: (rows, length) int64, at least as many rows as the largest batch; None: seeded random tokens.
        batch_sizes: each is run as it is, and those above 1 also with left-padded rows of different lengths.
        prompt_length: of the random prompts.
        decode_steps: cached steps after the prompt, at least 32.
        tolerance: the largest absolute difference of a logit and of a log-probability.
        device: as for `open_runtime`.
        threads: as for `open_runtime`.

    Returns:
        Plain JSON: maximum and mean absolute errors of logits and log-probabilities (nats), greedy_match (the share of
        positions with the same most probable token), positions, the tolerance, the worst position, what was run.

    Raises:
        ParityError: an error above the tolerance, a value that is not finite, a position that is missing, or logits so
            flat that nothing would be proved; names the worst position.
        InputError: too few or too long prompts, or too few decode steps.
        IntegrityError, MissingRuntime: as `open_runtime`.
    """
    if decode_steps < LEAST_DECODE_STEPS:
        raise InputError(f"decode_steps={decode_steps}: at least {LEAST_DECODE_STEPS} are needed")
    if (candidate / manifest.FILE_NAME).exists():
        manifest.verify(candidate)
    cases, rows, described = _run_reference(
        reference, prompts, batch_sizes, prompt_length, decode_steps, device=device, threads=threads
    )
    spread = min(float(row.logits.std(dim=-1).min()) for row in rows)
    if not spread > 10 * tolerance:
        raise ParityError(
            f"{reference}: its logits spread by {spread:.2g} only; a tolerance of {tolerance:g} would prove nothing"
        )
    opened = open_runtime(runtime, candidate, device=device, threads=threads)
    errors = _Errors()
    for case in cases:
        _compare_case(opened, case, rows, errors)
    result = {
        "runtime": runtime,
        "logit_error_max": errors.logit_max,
        "logit_error_mean": errors.logit_sum / errors.values,
        "logprob_error_max": errors.logprob_max,
        "logprob_error_mean": errors.logprob_sum / errors.values,
        "greedy_match": errors.matches / errors.positions,
        "positions": errors.positions,
        "tolerance": tolerance,
        "worst": asdict(errors.worst) if errors.worst else None,
        "batches": [{"batch_size": case.batch_size, "padded": case.padded} for case in cases],
        "prompt_length": len(rows[0].prompt),
        "decode_steps": decode_steps,
        "reference": described,
        "candidate": opened.describe(),
    }
    if not max(errors.logit_max, errors.logprob_max) <= tolerance:
        raise ParityError(
            f"{candidate} in {runtime} is not {reference}: logits differ by up to {errors.logit_max:.3g}, "
            f"log-probabilities by {errors.logprob_max:.3g} (tolerance {tolerance:g}); worst at {errors.worst}"
        )
    return result


# --- the reference -----------------------------------------------------------------------------------


def _run_reference(
    folder: Path,
    prompts: Tensor | None,
    batch_sizes: Sequence[int],
    prompt_length: int,
    decode_steps: int,
    *,
    device: str,
    threads: int | None,
) -> tuple[list[Case], list[Row], dict[str, Any]]:
    """What to run in batches, and what each row of it gives alone. The reference's weights are freed on return."""
    runtime = TorchRuntime(folder, device=device, threads=threads)
    if not batch_sizes or min(batch_sizes) < 1:
        raise InputError(f"batch_sizes={list(batch_sizes)}: at least one, each at least 1")
    if prompts is None:
        shape = (max(batch_sizes), prompt_length)
        prompts = torch.randint(runtime.vocabulary, shape, generator=torch.Generator().manual_seed(0))
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
    rows_alone = [_run_alone(runtime, prompts[index, :length], decode_steps) for index, length in alone]
    return cases, rows_alone, runtime.describe()


def _lengths(size: int, longest: int) -> list[int]:
    """Lengths of a ragged batch: from the whole prompt down to a single token."""
    return [longest - (longest - 1) * index // (size - 1) for index in range(size)]


def _run_alone(runtime: Runtime, prompt: Tensor, decode_steps: int) -> Row:
    logits = [runtime.prefill(prompt[None])[0]]
    greedy = []
    for _ in range(decode_steps):
        greedy.append(logits[-1][-1].argmax())
        logits.append(runtime.decode(greedy[-1].reshape(1, 1)))
    return Row(prompt, torch.stack(greedy), torch.cat(logits).float())


# --- the comparison ----------------------------------------------------------------------------------


def _compare_case(runtime: Runtime, case: Case, rows: Sequence[Row], errors: _Errors) -> None:
    """Run one batch and compare each of its positions."""
    batch = [rows[index] for index in case.rows]
    width = max(len(row.prompt) for row in batch)
    tokens = torch.zeros(len(batch), width, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for index, row in enumerate(batch):
        tokens[index, width - len(row.prompt) :] = row.prompt
        mask[index, width - len(row.prompt) :] = 1
    vocabulary = batch[0].logits.shape[-1]
    found = runtime.prefill(tokens, mask if case.padded else None)
    _require_shape(found, (len(batch), width, vocabulary), case, "prefill")
    for index, row in enumerate(batch):
        length = len(row.prompt)
        _compare(row.logits[:length], found[index, width - length :], case, index, "prefill", 0, errors)
    for step in range(len(batch[0].greedy)):
        found = runtime.decode(torch.stack([row.greedy[step] for row in batch])[:, None])
        _require_shape(found, (len(batch), vocabulary), case, f"decode step {step}")
        for index, row in enumerate(batch):
            expected = row.logits[len(row.prompt) + step][None]
            _compare(expected, found[index][None], case, index, "decode", step, errors)


def _require_shape(found: Tensor, expected: tuple[int, ...], case: Case, where: str) -> None:
    if tuple(found.shape) != expected:
        raise ParityError(
            f"batch size {case.batch_size}, {where}: logits have shape {list(found.shape)}, not {list(expected)}"
        )


def _compare(expected: Tensor, found: Tensor, case: Case, row: int, phase: str, first: int, errors: _Errors) -> None:
    """Add positions `first`, `first + 1`, … of one row, (positions, V) each. Raises ParityError for NaN or infinity."""
    found = found.float()
    difference = (found - expected).abs()
    # NaN compares as smaller than everything: take it as infinitely wrong, so that it becomes the worst position.
    ranked = torch.where(difference.isfinite(), difference, torch.inf)
    flat = int(ranked.argmax())
    position, token = divmod(flat, expected.shape[-1])
    worst = Position(
        case.batch_size,
        case.padded,
        row,
        phase,
        first + position,
        token,
        float(expected[position, token]),
        float(found[position, token]),
    )
    if not ranked[position, token].isfinite():
        raise ParityError(f"a logit is not finite: {worst}")
    if float(ranked[position, token]) > errors.logit_max:
        errors.logit_max, errors.worst = float(ranked[position, token]), worst
    logprobs = (found.log_softmax(-1) - expected.log_softmax(-1)).abs()
    errors.logprob_max = max(errors.logprob_max, float(logprobs.max()))
    errors.logprob_sum += float(logprobs.sum())
    errors.logit_sum += float(difference.sum())
    errors.values += expected.numel()
    errors.positions += len(expected)
    errors.matches += int((found.argmax(-1) == expected.argmax(-1)).sum())
