"""What a server of a release must answer, computed with transformers in float32."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from numprune.errors import InputError
from numprune.export.checkpoint import load
from numprune.export.prompts import TEXTS
from numprune.serving.canary import MINIMUM_STEPS, REFERENCE, Encoded, Prompt, Reference

_LENGTHS = (64, 48, 24, 9)  # tokens of each text, so that a batch is ragged
_CPU = torch.device("cpu")


def reference(checkpoint: Path, device: torch.device = _CPU) -> Reference:
    """The reference of a checkpoint. Raises InputError (its context is too short), IntegrityError."""
    model, tokenizer = load(checkpoint)
    model.to(device)
    room = model.config.max_position_embeddings - MINIMUM_STEPS - 1  # a server takes no prompt that fills its context
    if room < 1:
        raise InputError(
            f"{checkpoint}: its context of {model.config.max_position_embeddings} tokens cannot hold the "
            f"{MINIMUM_STEPS} greedy tokens that a server is compared by"
        )
    texts = [Encoded(text=text, tokens=tokenizer.encode(text, add_special_tokens=False)) for text in TEXTS.values()]
    prompts = [
        _prompt(model, tokenizer.encode(text)[: min(length, room)])
        for text, length in zip(TEXTS.values(), _LENGTHS, strict=True)
    ]
    return Reference(texts=texts, prompts=prompts)


@torch.inference_mode()
def _prompt(model: PreTrainedModel, tokens: Sequence[int]) -> Prompt:
    sequence = torch.tensor([tokens], device=model.device)  # (1, S)
    for _ in range(MINIMUM_STEPS):
        # Without a cache: what is compared by it must not depend on one.
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


def make_canary(out: Path, *, checkpoint: Path, device: str) -> dict[str, Any]:
    """Stage: the reference, canary.json."""
    made = reference(checkpoint, torch.device(device))
    made.write(out / REFERENCE)
    return {"prompts": len(made.prompts), "longest": made.length}
