"""Sample images from a generator, code by code, with a KV cache and classifier-free guidance."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from numprune.anatomy import code_vocabulary, codes_per_image
from numprune.codes import CodeVocabulary
from numprune.errors import InputError, IntegrityError

# Images that have a KV cache at once. A constant, not a setting: noise is drawn batch by batch, so that with another
# number the same seed would give other images, and runs on different machines could not be compared.
_BATCH = 16


def guided(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Return logits u + w (c - u): classifier-free guidance of scale w; 1 is the conditional model."""
    return unconditional + scale * (conditional - unconditional)


@torch.inference_mode()
def sample(
    model: PreTrainedModel,
    labels: Sequence[int | None],
    *,
    guidance: float = 1.0,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
) -> Tensor:
    """Return a square image for each label, (n, L) int64 codes.

    Two models draw with the same noise for the same `seed`: where their distributions agree, so do their images. A code
    is the largest of its logits plus Gumbel noise, which is a draw from the softmax (Maddison et al., 2014).

    Args:
        model: an image generator.
        labels: class of each image; None: without a class.
        guidance: scale of classifier-free guidance; unless it is 1, each image needs a class.
        temperature: above 0, divides the guided logits.
        top_k: draw only from this many most probable codes; None: from all.
        seed: of the noise.

    Raises:
        InputError: the model is no image generator, or an argument does not apply to it.
        IntegrityError: the model's logits are not finite.
    """
    codes = code_vocabulary(model.config)
    if codes is None:
        raise InputError(f"{model.config.model_type}: not an image generator")
    if guidance != 1 and None in labels:
        raise InputError(f"guidance {guidance:g}: an image without a class cannot be guided; use 1 or give classes")
    if temperature <= 0 or (top_k is not None and not 0 < top_k <= codes.codes):
        raise InputError(f"temperature {temperature:g}, top_k {top_k}: need more than 0 and 1 to {codes.codes}")
    noise = torch.Generator().manual_seed(seed)
    starts = [codes.start if label is None else codes.start_of(label) for label in labels]
    batches = [starts[first : first + _BATCH] for first in range(0, len(starts), _BATCH)]
    return torch.cat([_batch(model, batch, codes, guidance, temperature, top_k, noise) for batch in batches])


def _batch(
    model: PreTrainedModel,
    starts: Sequence[int],
    codes: CodeVocabulary,
    guidance: float,
    temperature: float,
    top_k: int | None,
    noise: torch.Generator,
) -> Tensor:
    both = guidance != 1
    tokens = torch.tensor([*starts, *([codes.start] * len(starts) if both else [])], device=model.device)[:, None]
    cache = DynamicCache(config=model.config)
    found: list[Tensor] = []
    for _ in range(codes_per_image(model.config)):
        logits = model(input_ids=tokens, past_key_values=cache, use_cache=True).logits[:, -1].float()
        if not torch.isfinite(logits).all():
            raise IntegrityError("the model's logits are not finite; its weights are damaged or overflow")
        if both:
            conditional, unconditional = logits.chunk(2)
            logits = guided(conditional, unconditional, guidance)
        logits = logits / temperature
        if top_k is not None:
            logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
        gumbel = -torch.empty(logits.shape).exponential_(generator=noise).log()
        found.append((logits + gumbel.to(logits.device)).argmax(-1))
        tokens = found[-1][:, None].repeat(2 if both else 1, 1)
    return torch.stack(found, 1).cpu()
