"""Proof that a runtime computes what an encoder's checkpoint computes: single texts or images, and batched.

The reference runs every text or image alone in PyTorch, float32. The candidate runs each alone, and all of them in one
batch, texts padded on the right. The tolerance of a text is that of `parity`: `FLOOR`, or `FACTOR` times the
reference's own float32 error on it. In half precision, `noise` is applied to all texts together, because one text has
few outputs. A difference above the tolerance raises ParityError.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from numprune.anatomy import read_anatomy
from numprune.errors import ParityError
from numprune.export import checkpoint, float64, manifest, noise
from numprune.export.noise import Noise
from numprune.export.precision import DTYPES, FLOAT32
from numprune.export.prompts import TEXTS
from numprune.export.runtimes.encoder import TorchEncoder, open_encoder
from numprune.export.tolerance import FLOOR, Allowed, AllowedNoise, Limit

_LENGTHS = (24, 9, 2, 16)  # tokens of each text; different, so that a batch is ragged
_RANDOM = 16  # of rare tokens
_DEVIATIONS = (0.25, 0.5, 1.0, 2.0)  # of images


@dataclass(frozen=True)
class Position:
    """One output value and its position; `padded`: in the batch of all texts, which are padded, or of all images."""

    padded: bool
    text: str
    entry: int
    reference: float
    candidate: float

    @property
    def error(self) -> float:
        """The absolute difference; infinite if either value is NaN."""
        difference = abs(self.reference - self.candidate)
        return difference if math.isfinite(difference) else math.inf

    def __str__(self) -> str:
        how = "in a batch" if self.padded else "alone"
        return f"{self.text} {how}, entry {self.entry}: reference {self.reference:.6g}, candidate {self.candidate:.6g}"


def check(
    reference: Path,
    candidate: Path,
    runtime: str,
    *,
    device: str = "auto",
    threads: int | None = None,
    dtype: str = FLOAT32,
) -> dict[str, Any]:
    """Compare `candidate` in `runtime` with the checkpoint `reference`, value by value.

    The outputs of the task are compared: logits of a masked language model or a classifier, or embeddings.

    Args:
        reference: a checkpoint folder.
        candidate: the export that the runtime loads; if it has a manifest, its digests are verified first.
        runtime: a name accepted by `open_encoder`.
        device, threads, dtype: as for `open_encoder`.

    Returns:
        Plain JSON: dtype, the largest and the mean absolute error, positions (output values), the worst one and the
        tolerance of its text, `texts` (error, tolerance and criterion of each) and the settings of the run.

    Raises:
        ParityError: an error above the tolerance, a value that is not finite, or outputs so alike that nothing would be
            proved; names the text and the worst value.
        InputError, IntegrityError, MissingRuntime: as `open_encoder`.
    """
    if (candidate / manifest.FILE_NAME).exists():
        manifest.verify(candidate)
    encoder = TorchEncoder(reference, device=device, threads=threads)
    texts, batch = _texts(reference, encoder.vocabulary) if encoder.image is None else _images(encoder.image)
    expected = {name: encoder.forward(tokens[None])[0] for name, tokens in texts.items()}
    opened = open_encoder(runtime, candidate, device=device, threads=threads, dtype=dtype)
    dtype = opened.describe()["dtype"]
    alone = {name: opened.forward(tokens[None])[0] for name, tokens in texts.items()}
    batched = dict(zip(texts, opened.forward(*batch), strict=True))
    if encoder.task.name == "masked-lm":  # an output for each token, including padding
        batched = {name: output[: len(texts[name])] for name, output in batched.items()}
    found = [_compare(name, expected[name], alone[name], batched[name]) for name in texts]
    _require_contrast(reference, expected)
    allowed: Sequence[Limit]
    if dtype == FLOAT32:
        allowed = _allowed(encoder, texts, expected, found)
    else:
        errors = torch.cat([(one[name] - expected[name]).flatten() for one in (alone, batched) for name in texts])
        found = [replace(one, noise=noise.of_errors(errors)) for one in found]
        allowed = [_allowed_noise(reference, texts, expected, dtype, device)] * len(found)
    for difference, limit in zip(found, allowed, strict=True):
        if not limit.share(difference) <= 1:
            raise ParityError(_refusal(reference, candidate, runtime, difference, limit))
    largest = max(range(len(found)), key=lambda index: found[index].worst.error)
    return {
        "runtime": runtime,
        "dtype": dtype,
        "output_error_max": found[largest].worst.error,
        "output_error_mean": sum(one.sum for one in found) / sum(one.values for one in found),
        "positions": sum(one.values for one in found),
        **{
            name: value
            for name, value in allowed[largest].describe(found[largest]).items()
            if name in ("tolerance", "noise", "noise_floor")
        },
        "worst": asdict(found[largest].worst),
        "texts": [
            {
                "text": name,
                "tokens": read_anatomy(encoder.model.config).tokens_of(tokens.shape),
                "output_error_max": difference.worst.error,
                **limit.describe(difference),
            }
            for (name, tokens), difference, limit in zip(texts.items(), found, allowed, strict=True)
        ],
        "reference": encoder.describe(),
        "candidate": opened.describe(),
    }


@dataclass(frozen=True)
class _Difference:
    """Results of one text, alone and in the batch: the worst value, and the sum of errors over `values` values."""

    worst: Position
    sum: float
    values: int
    noise: Noise | None = None  # of all texts; only in half precision

    @property
    def error(self) -> float:
        return self.worst.error


Batch = tuple[Tensor, Tensor | None]  # arguments of `Encoder.forward`


def _texts(folder: Path, vocabulary: int) -> tuple[dict[str, Tensor], Batch]:
    """Return name -> tokens (S,), of tokenized text and of rare tokens, and the batch of all."""
    tokenizer = checkpoint.load_tokenizer(folder)
    found = {
        name: torch.tensor(tokenizer.encode(text, truncation=True, max_length=length))
        for (name, text), length in zip(TEXTS.items(), _LENGTHS, strict=True)
    }
    random = torch.randint(vocabulary, (_RANDOM,), generator=torch.Generator().manual_seed(0))
    found["random tokens"] = random
    return found, _batch(list(found.values()), tokenizer.pad_token_id or 0)


def _images(shape: tuple[int, int, int]) -> tuple[dict[str, Tensor], Batch]:
    """Return name -> pixel values (C, height, width), with contrasts like those of normalized images, and the batch."""
    generator = torch.Generator().manual_seed(0)
    found = {f"noise of deviation {size:g}": size * torch.randn(shape, generator=generator) for size in _DEVIATIONS}
    return found, (torch.stack(list(found.values())), None)


def _batch(texts: Sequence[Tensor], padding: int) -> tuple[Tensor, Tensor]:
    """Return all texts as tokens and mask, (B, S) each."""
    width = max(map(len, texts))
    tokens = torch.full((len(texts), width), padding)
    mask = torch.zeros_like(tokens)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = text
        mask[row, : len(text)] = 1
    return tokens, mask


def _compare(name: str, expected: Tensor, alone: Tensor, batched: Tensor) -> _Difference:
    """Raise ParityError if the candidate's output has another shape."""
    positions, total = [], 0.0
    for padded, found in ((False, alone), (True, batched)):
        if found.shape != expected.shape:
            raise ParityError(f"{name}: the output has shape {list(found.shape)}, not {list(expected.shape)}")
        difference = (found - expected).abs().flatten()
        # No comparison with NaN holds: count it as infinitely wrong, so that it becomes the worst.
        entry = int(torch.where(difference.isfinite(), difference, torch.inf).argmax())
        values = (float(expected.flatten()[entry]), float(found.flatten()[entry]))
        positions.append(Position(padded, name, entry, *values))
        total += float(difference.sum())
    return _Difference(max(positions, key=lambda one: one.error), total, 2 * expected.numel())


def _allowed(
    encoder: TorchEncoder, texts: Mapping[str, Tensor], expected: Mapping[str, Tensor], found: Sequence[_Difference]
) -> list[Allowed]:
    """Return the tolerance of each text; only those that exceed the floor run in float64."""
    exceeded = [difference.worst.error > FLOOR for difference in found]
    if any(exceeded):
        float64.in_float64(encoder.model)
    allowed = []
    for (name, tokens), beyond in zip(texts.items(), exceeded, strict=True):
        fed = tokens[None].to(encoder.device)
        compute = partial(encoder.task.output, encoder.model, fed, torch.ones_like(fed))
        exact = float64.run(compute)[0] if beyond else None
        allowed.append(Allowed(FLOOR, None if exact is None else float((expected[name] - exact).abs().max())))
    return allowed


def _allowed_noise(
    reference: Path, texts: Mapping[str, Tensor], expected: Mapping[str, Tensor], dtype: str, device: str
) -> AllowedNoise:
    """Return the noise floor of all texts, at least the rounding of one output."""
    encoder = TorchEncoder(reference, device=device, dtype=dtype)
    errors = torch.cat([(encoder.forward(texts[name][None])[0] - expected[name]).flatten() for name in texts])
    rounding = torch.finfo(DTYPES[dtype]).eps * float(torch.cat([one.flatten() for one in expected.values()]).std())
    return AllowedNoise(dtype, noise.of_errors(errors).worst(Noise(rounding, rounding)))


def _require_contrast(reference: Path, expected: Mapping[str, Tensor]) -> None:
    """Raise ParityError if the outputs of all texts are so alike that a wrong one would be within the tolerance."""
    first = [output.flatten()[: min(one.numel() for one in expected.values())] for output in expected.values()]
    spread = float(torch.stack(first).std(0).max())
    if not spread > 10 * FLOOR:
        raise ParityError(
            f"{reference}: its outputs for different inputs differ by only {spread:.2g}; a tolerance of {FLOOR:g} "
            "would prove nothing"
        )


def _refusal(reference: Path, candidate: Path, runtime: str, found: _Difference, limit: Limit) -> str:
    in_noise = f" ({found.noise} over all texts)" if found.noise else ""
    return (
        f"{candidate} in {runtime} does not compute what {reference} does: {found.worst}, which differ by "
        f"{found.error:.3g}{in_noise}; {limit.reason}. Export it again; if that fails too, {runtime} runs this "
        "architecture wrongly: use another version of it"
    )
