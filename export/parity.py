"""Proof that a runtime computes what the checkpoint computes, in prefill and cached decoding, batched and padded.

The reference runs every row alone and without padding in PyTorch, float32. The candidate runs the same rows in batches,
including ragged ones padded on the left, and is fed the reference's greedy tokens, so each position has one right
answer. A difference above the tolerance raises ParityError. If a model has attention windows, one more prompt reaches
beyond them; of a long prompt, only the last position is compared, and the tokens after it.

Each prompt has its own tolerance: `FLOOR`, which most exports stay far below. If hidden values are large, rounding
alone can exceed it. The reference then runs that prompt again in float64, and the tolerance is `FACTOR` times the
reference's own float32 error.

A candidate in half precision is judged by `noise` instead: on each prompt and in every batch, the mean and the 99th
percentile of its errors may be `noise.FACTOR` times those of PyTorch in the same precision. A candidate that rounds
activations to 8 bits in blocks is judged by the noise of bfloat16, in which quantized models are usually served; its
reference does not round them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from numprune.anatomy import read_anatomy
from numprune.errors import InputError, ParityError
from numprune.export import compressed_tensors, float64, manifest, noise
from numprune.export.config import read_config
from numprune.export.noise import Noise
from numprune.export.parity_reference import Case, Row, run_reference, window_of
from numprune.export.precision import FLOAT32
from numprune.export.runtimes import Runtime, open_runtime
from numprune.export.runtimes.torch_eager import TorchRuntime
from numprune.export.tolerance import FLOOR, Allowed, AllowedNoise, Limit

LEAST_DECODE_STEPS = 32


@dataclass(frozen=True)
class Position:
    """One logit and its position."""

    batch_size: int
    padded: bool
    row: int  # in the batch
    phase: str  # "prefill" or "decode"
    position: int  # in the row's own tokens (without padding) at prefill, step at decode
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
class _Difference:
    """Differences between candidate and reference over all positions of one row."""

    logit_max: float = -1.0
    logit_sum: float = 0.0
    logprob_max: float = 0.0
    logprob_sum: float = 0.0
    values: int = 0
    positions: int = 0
    matches: int = 0
    worst: Position | None = None
    noise: Noise | None = None  # of the worst batch; only if judged by noise

    @property
    def error(self) -> float:
        return max(self.logit_max, self.logprob_max)


def check(
    reference: Path,
    candidate: Path,
    runtime: str,
    *,
    prompts: Tensor | None = None,
    batch_sizes: Sequence[int] = (1, 3),
    prompt_length: int = 24,
    decode_steps: int = LEAST_DECODE_STEPS,
    floor: float = FLOOR,
    device: str = "auto",
    threads: int | None = None,
    dtype: str = FLOAT32,
) -> dict[str, Any]:
    """Compare `candidate` in `runtime` with the checkpoint `reference`, logit by logit.

    Args:
        reference: a checkpoint folder.
        candidate: the export that the runtime loads; if it has a manifest, its digests are verified first.
        runtime: a name accepted by `open_runtime`.
        prompts: (rows, length) int64, at least as many rows as the largest batch; None: alternating text and seeded
            random tokens.
        batch_sizes: each is run with rows of one length; sizes above 1 also with left-padded rows of different lengths.
        prompt_length: tokens per prompt, if `prompts` is None.
        decode_steps: cached steps after the prompt, at least 32.
        floor: the smallest tolerance: an absolute difference of logits and of log-probabilities.
        device: as for `open_runtime`.
        threads: as for `open_runtime`.
        dtype: as for `open_runtime`.

    Returns:
        Plain JSON: dtype, maximum and mean absolute errors of logits and log-probabilities (nats), greedy_match (the
        share of positions with the same most probable token), positions, the worst position and the tolerance of its
        prompt, `prompts` (errors, tolerance and criterion of each: "floor", "float32 error" or "bfloat16 noise") and
        the settings of the run. If judged by noise, the tolerance refers to the 99th percentile, and `noise` and
        `noise_floor` contain the mean, too. `rounded` states what a quantized export rounds. `window`: the smallest
        attention window of a model that has some, and `beyond_window`: whether a prompt was longer. A prompt beyond a
        window of more than 2,048 tokens, or of a large model, would take too long.

    Raises:
        ParityError: an error above the tolerance, a value that is not finite, a missing position, or logits so flat (or
            float32 so inexact) that nothing would be proved; names the prompt and the worst position.
        InputError: too few or too long prompts, or too few decode steps.
        IntegrityError, MissingRuntime: as `open_runtime`.
    """
    if decode_steps < LEAST_DECODE_STEPS:
        raise InputError(f"decode_steps={decode_steps}: at least {LEAST_DECODE_STEPS} are needed")
    facts = manifest.verify(candidate).facts if (candidate / manifest.FILE_NAME).exists() else {}
    rounded = facts.get("rounded")
    longest = cast("int | None", facts.get("max_length"))  # of a TensorRT engine
    # Between two checkpoints, activations are not rounded: the last digit can decide the rounding step, and
    # format_parity.py compares the scheme.
    rounds_inputs = not rounded and runtime != "torch"
    open_reference = partial(TorchRuntime, reference, device=device, rounds_inputs=rounds_inputs)
    cases, rows, described = run_reference(
        open_reference(threads=threads), reference, prompts, batch_sizes, prompt_length, decode_steps, longest
    )
    for row in rows:
        _require_contrast(reference, row, Allowed(floor, None))
    opened = (
        TorchRuntime(candidate, device=device, threads=threads, dtype=dtype, rounds_inputs=False)
        if runtime == "torch"
        else open_runtime(runtime, candidate, device=device, threads=threads, dtype=dtype)
    )
    ran = opened.describe()
    judged_in = "bfloat16" if rounded else ran["dtype"]
    found = [_Difference() for _ in rows]
    for case in cases:
        _compare_case(opened, case, rows, found, noisy=judged_in != FLOAT32)
    del opened  # the reference is loaded again later
    allowed: Sequence[Limit] = (
        _allowed(open_reference, reference, rows, found, floor)
        if judged_in == FLOAT32
        else _allowed_noise(open_reference(dtype=judged_in), reference, rows, judged_in)
    )
    worst = max(range(len(rows)), key=lambda index: allowed[index].share(found[index]))
    if not allowed[worst].share(found[worst]) <= 1:
        raise ParityError(_refusal(reference, candidate, ran, rows[worst], found[worst], allowed[worst]))
    largest = max(range(len(rows)), key=lambda index: found[index].error) if judged_in == FLOAT32 else worst
    place = found[largest].worst
    assert place is not None  # every row has positions
    window = window_of(read_anatomy(read_config(reference)))
    values, positions = sum(one.values for one in found), sum(one.positions for one in found)
    return {
        "runtime": runtime,
        "dtype": ran["dtype"],
        **({"rounded": rounded} if rounded else {}),
        "logit_error_max": max(one.logit_max for one in found),
        "logit_error_mean": sum(one.logit_sum for one in found) / values,
        "logprob_error_max": max(one.logprob_max for one in found),
        "logprob_error_mean": sum(one.logprob_sum for one in found) / values,
        "greedy_match": sum(one.matches for one in found) / positions,
        "positions": positions,
        **{
            name: value
            for name, value in allowed[largest].describe(found[largest]).items()
            if name in ("tolerance", "noise", "noise_floor")
        },
        "worst": asdict(place),
        "prompts": [
            {
                "prompt": row.name,
                "tokens": len(row.prompt),
                "logit_error_max": difference.logit_max,
                "logprob_error_max": difference.logprob_max,
                **limit.describe(difference),
            }
            for row, difference, limit in zip(rows, found, allowed, strict=True)
        ],
        "batches": [{"batch_size": case.batch_size, "padded": case.padded} for case in cases],
        "prompt_length": len(rows[0].prompt),
        **({"window": window, "beyond_window": max(len(row.prompt) for row in rows) > window} if window else {}),
        "decode_steps": decode_steps,
        "reference": described,
        "candidate": ran,
    }


# --- tolerances --------------------------------------------------------------------------------------


def _allowed(
    open_reference: Callable[[], TorchRuntime],
    reference: Path,
    rows: Sequence[Row],
    found: Sequence[_Difference],
    floor: float,
) -> list[Allowed]:
    """Return the tolerance of each row; only rows that exceed the floor run in float64. Raises ParityError."""
    exceeded = [index for index, one in enumerate(found) if one.error > floor]
    allowed = [Allowed(floor, None)] * len(rows)
    if not exceeded:
        return allowed
    model = open_reference().model
    float64.in_float64(model)
    for index in exceeded:
        row = rows[index]
        exact = float64.logits(model, torch.cat([row.prompt, row.greedy]), row.first)
        logits = row.logits.double()
        error = max(
            float((logits - exact).abs().max()),
            float((logits.log_softmax(-1) - exact.log_softmax(-1)).abs().max()),
        )
        allowed[index] = Allowed(floor, error)
        _require_contrast(reference, row, allowed[index])
    return allowed


def _allowed_noise(runtime: Runtime, reference: Path, rows: Sequence[Row], dtype: str) -> list[AllowedNoise]:
    """Return the noise floor of each row: the error of the reference in `dtype`.

    Raises ParityError if it is so high that nothing would be proved.
    """
    allowed = []
    for row in rows:
        found = runtime.prefill(torch.cat([row.prompt, row.greedy])[None])[0, row.first :]
        floor = noise.of_logits(row.logits, found)
        spread = float(row.logits.std(dim=-1).min())
        if not spread > noise.CONTRAST * noise.FACTOR * floor.mean:
            # A quantized checkpoint is computed in its own precision.
            quantized = compressed_tensors.quantization_in(reference) is not None
            remedy = "prune less, or leave it unquantized and use float32" if quantized else "use float32"
            raise ParityError(
                f"{reference}: on {row.name} its logits spread by only {spread:.2g}, and PyTorch in {dtype} errs there "
                f"by {floor}: no runtime computes this checkpoint reliably in {dtype}; {remedy}"
            )
        allowed.append(AllowedNoise(dtype, floor))
    return allowed


def _require_contrast(reference: Path, row: Row, allowed: Allowed) -> None:
    """Raise ParityError if the logits of a row are so alike that wrong ones would be within the tolerance."""
    spread = float(row.logits.std(dim=-1).min())
    if spread > 10 * allowed.tolerance:
        return
    found = f"{reference}: on {row.name} its logits spread by only {spread:.2g}"
    if allowed.float32_error is None:
        raise ParityError(f"{found}; a tolerance of {allowed.tolerance:g} would prove nothing")
    raise ParityError(
        f"{found}, and PyTorch's own float32 error there is {allowed.float32_error:.2g}: no float32 runtime computes "
        "this checkpoint reliably; prune less, or with a compensation that keeps hidden values small"
    )


def _refusal(
    reference: Path, candidate: Path, ran: Mapping[str, Any], row: Row, found: _Difference, allowed: Limit
) -> str:
    runtime = ran["runtime"]
    remedy = (
        f"8-bit activations are too coarse for this model in {runtime}: serve it with vLLM (--to vllm)"
        if "rounded" in ran
        else f"{runtime} runs this architecture wrongly: use another version of it"
    )
    in_noise = f" ({found.noise})" if found.noise else ""
    return (
        f"{candidate} in {runtime} does not compute what {reference} does: on {row.name}, prompt length "
        f"{len(row.prompt)}, logits differ by up to {found.logit_max:.3g}, log-probabilities by "
        f"{found.logprob_max:.3g}{in_noise}; {allowed.reason}; worst at {found.worst}. Export it again; if that fails "
        f"too, {remedy}"
    )


# --- the comparison ----------------------------------------------------------------------------------


def _compare_case(
    runtime: Runtime, case: Case, rows: Sequence[Row], found: Sequence[_Difference], *, noisy: bool
) -> None:
    """Run one batch and compare each position; if judged by noise, also measure each row's noise."""
    batch = [rows[index] for index in case.rows]
    width = max(len(row.prompt) for row in batch)
    tokens = torch.zeros(len(batch), width, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for index, row in enumerate(batch):
        tokens[index, width - len(row.prompt) :] = row.prompt
        mask[index, width - len(row.prompt) :] = 1
    vocabulary = batch[0].logits.shape[-1]
    differences = [found[index] for index in case.rows]
    logits = runtime.prefill(tokens, mask if case.padded else None, last_only=case.last_only)
    _require_shape(logits, (len(batch), 1 if case.last_only else width, vocabulary), case, "prefill")
    outputs = []  # of each row (positions, V), step by step
    compared = [len(row.prompt) - row.first for row in batch]  # positions of each prompt
    for index, row in enumerate(batch):
        outputs.append([logits[index, -compared[index] :]])
        expected = row.logits[: compared[index]]
        _compare(expected, outputs[index][0], case, index, "prefill", row.first, differences[index])
    for step in range(len(batch[0].greedy)):
        logits = runtime.decode(torch.stack([row.greedy[step] for row in batch])[:, None])
        _require_shape(logits, (len(batch), vocabulary), case, f"decode step {step}")
        for index, row in enumerate(batch):
            expected = row.logits[compared[index] + step][None]
            _compare(expected, logits[index][None], case, index, "decode", step, differences[index])
            outputs[index].append(logits[index][None])
    if noisy:
        for row, output, difference in zip(batch, outputs, differences, strict=True):
            difference.noise = noise.of_logits(row.logits, torch.cat(output)).worst(difference.noise)


def _require_shape(found: Tensor, expected: tuple[int, ...], case: Case, where: str) -> None:
    if tuple(found.shape) != expected:
        raise ParityError(
            f"batch size {case.batch_size}, {where}: logits have shape {list(found.shape)}, not {list(expected)}"
        )


def _compare(expected: Tensor, found: Tensor, case: Case, row: int, phase: str, first: int, total: _Difference) -> None:
    """Add positions `first`, `first + 1`, … of one row, (positions, V) each. Raises ParityError on NaN or infinity."""
    found = found.float()
    difference = (found - expected).abs()
    # No comparison with NaN holds: count it as infinitely wrong, so that it becomes the worst position.
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
    if float(ranked[position, token]) > total.logit_max:
        total.logit_max, total.worst = float(ranked[position, token]), worst
    logprobs = (found.log_softmax(-1) - expected.log_softmax(-1)).abs()
    total.logprob_max = max(total.logprob_max, float(logprobs.max()))
    total.logprob_sum += float(logprobs.sum())
    total.logit_sum += float(difference.sum())
    total.values += expected.numel()
    total.positions += len(expected)
    total.matches += int((found.argmax(-1) == expected.argmax(-1)).sum())
