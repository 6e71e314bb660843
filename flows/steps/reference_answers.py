"""Computes a release's reference answers with transformers: in float32, or in float64 for encoders."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from numprune.anatomy import context_of
from numprune.errors import InputError
from numprune.export import float64, noise
from numprune.export.checkpoint import load
from numprune.export.compressed_tensors import quantization_in
from numprune.export.prompts import TEXTS
from numprune.export.tasks import load_task
from numprune.placement import place
from numprune.serving.reference_answers import (
    MINIMUM_STEPS,
    CompletionAnswers,
    Encoded,
    Noise,
    PooledAnswers,
    PooledText,
    Prompt,
    ReferenceAnswers,
    Rounding,
)
from numprune.tasks import Task

_LENGTHS = (64, 48, 24, 9)  # tokens of each text, so that a batch is ragged
_HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_CPU = torch.device("cpu")


def answers_of(checkpoint: Path, device: torch.device = _CPU, *, unquantized: Path | None = None) -> ReferenceAnswers:
    """Compute the reference answers of a checkpoint.

    For a quantized checkpoint, `unquantized` is the model before quantization, whose rounding errors limit a server's.

    Raises InputError (its context is too short), IntegrityError.
    """
    task = load_task(checkpoint)
    if quantization_in(checkpoint) is None:  # a mixed plan may quantize no block
        unquantized = None
    quantized = unquantized is not None
    made = (
        _completions(checkpoint, device, quantized)
        if task.name == "causal-lm"
        else _pooled(checkpoint, task, device, quantized)
    )
    if unquantized is None:
        return made
    errors = (
        _errors_in_half(unquantized, device, lambda model: _logprobs_of(made.prompts, partial(_logits, model)))
        if isinstance(made, CompletionAnswers)
        else _errors_in_half(
            unquantized, device, lambda model: _values(model, [one.tokens for one in made.inputs], task)
        )
    )
    floor = {name: noise.of_errors(found) for name, found in errors.items() if found.isfinite().all()}
    return made.model_copy(update={"noise_floor": {name: Noise(**asdict(one)) for name, one in floor.items()}})


def _errors_in_half(
    checkpoint: Path, device: torch.device, outputs: Callable[[PreTrainedModel], Tensor]
) -> dict[str, Tensor]:
    """How far the outputs in each half precision are from those in float32."""
    exact, *half = (
        outputs(place(load(checkpoint, dtype)[0], device)).double() for dtype in (torch.float32, *_HALF.values())
    )
    return {name: found - exact for name, found in zip(_HALF, half, strict=True)}


def _completions(checkpoint: Path, device: torch.device, quantized: bool) -> CompletionAnswers:
    model, tokenizer = load(checkpoint)
    place(model, device)
    room = model.config.max_position_embeddings - MINIMUM_STEPS - 1  # servers refuse prompts that fill the context
    if room < 1:
        raise InputError(
            f"{checkpoint}: its context of {model.config.max_position_embeddings} tokens has no room for the "
            f"{MINIMUM_STEPS} greedy tokens of the server check"
        )
    prompts = [
        _prompt(model, tokenizer.encode(text)[: min(length, room)])
        for text, length in zip(TEXTS.values(), _LENGTHS, strict=True)
    ]
    float64.in_float64(model)
    found = {"float32": _logprobs_of(prompts, partial(float64.logits, model))}
    del model
    for name, dtype in _HALF.items():
        half = place(load(checkpoint, dtype)[0], device)
        found[name] = _logprobs_of(prompts, partial(_logits, half))
    expected = [value for prompt in prompts for value in (*prompt.logprobs, *prompt.greedy_logprobs)]
    exact = torch.tensor(expected, dtype=torch.float64)
    return CompletionAnswers(
        texts=_encoded(tokenizer), prompts=prompts, rounding=_rounding(found, exact, percentile=quantized)
    )


def _pooled(checkpoint: Path, task: Task, device: torch.device, quantized: bool) -> PooledAnswers:
    """Embeddings at length 1, or class probabilities; text by text. Raises InputError for other tasks."""
    if task.name not in ("embedding", "classification"):
        raise InputError(f"{checkpoint}: {task.name} models cannot be served")
    model, tokenizer = load(checkpoint)
    context = context_of(model.config)
    texts = [
        tokenizer.encode(text, truncation=True, max_length=min(length, context))
        for text, length in zip(TEXTS.values(), _LENGTHS, strict=True)
    ]

    rounded = {}
    for name, dtype in {"float32": torch.float32, **_HALF}.items():
        rounded[name] = _values(place(load(checkpoint, dtype)[0], device), texts, task).double()
    float64.in_float64(place(model, device))
    exact = float64.run(lambda: _values(model, texts, task))
    return PooledAnswers(
        task=task.name,
        texts=_encoded(tokenizer),
        inputs=[
            PooledText(tokens=tokens, values=_plain(of_text)) for tokens, of_text in zip(texts, exact, strict=True)
        ],
        rounding=_rounding(rounded, exact, percentile=quantized),
    )


@torch.no_grad()
def _values(model: PreTrainedModel, texts: Sequence[Sequence[int]], task: Task) -> Tensor:
    """(texts, values): embeddings at length 1, or class probabilities, of the tokens of each text by itself."""
    found = []
    for tokens in texts:
        fed = torch.tensor([tokens], device=model.device)
        output = task.output(model, fed, torch.ones_like(fed))[0]
        found.append(normalize(output, dim=-1) if task.name == "embedding" else output.softmax(-1))
    return torch.stack(found).cpu()


def _encoded(tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    return [Encoded(text=text, tokens=tokenizer.encode(text, add_special_tokens=False)) for text in TEXTS.values()]


def _rounding(found: Mapping[str, Tensor], exact: Tensor, *, percentile: bool) -> dict[str, Rounding]:
    """The error of each precision, by its values (any shape) and the exact ones; nothing for one that overflows."""
    errors = {name: (values - exact).abs() for name, values in found.items()}
    return {
        name: Rounding(
            worst=float(error.max()),
            mean=float(error.mean()),
            p99=noise.of_errors(error).p99 if percentile else None,
        )
        for name, error in errors.items()
        if error.isfinite().all()
    }


def _logprobs_of(prompts: Sequence[Prompt], logits: Callable[[Tensor], Tensor]) -> Tensor:
    """The log-probability of every token but the first of each prompt and its continuation, (positions,) float64.

    `logits`: (S,) -> (S, V).
    """
    found = []
    for prompt in prompts:
        tokens = torch.tensor([*prompt.tokens, *prompt.greedy])
        found.append(logits(tokens)[:-1].double().log_softmax(-1).gather(1, tokens[1:, None])[:, 0])
    return torch.cat(found)


@torch.inference_mode()
def _logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    found: Tensor = model(input_ids=tokens[None].to(model.device), use_cache=False).logits[0]
    return found.cpu()


@torch.inference_mode()
def _prompt(model: PreTrainedModel, tokens: Sequence[int]) -> Prompt:
    sequence = torch.tensor([tokens], device=model.device)  # (1, S)
    for _ in range(MINIMUM_STEPS):
        # Without a cache, on which the reference must not depend.
        following = model(input_ids=sequence, use_cache=False, logits_to_keep=1).logits[:, -1].argmax(-1)
        sequence = torch.cat([sequence, following[:, None]], 1)
    logprobs = model(input_ids=sequence, use_cache=False).logits[0].float().log_softmax(-1)  # (S, V)
    chosen = logprobs[:-1].gather(1, sequence[0, 1:, None])[:, 0]
    best = logprobs[len(tokens) - 1 : -1].topk(2, -1).values  # (steps, 2)
    start = len(tokens) - 1
    return Prompt(
        tokens=list(tokens),
        logprobs=_plain(chosen[:start]),
        greedy=sequence[0, len(tokens) :].tolist(),
        greedy_logprobs=_plain(chosen[start:]),
        margins=_plain(best[:, 0] - best[:, 1]),
    )


def _plain(values: Tensor) -> list[float]:
    return [float(value) for value in values]
