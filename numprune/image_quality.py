"""How far a pruned image generator is from the dense one: guided distributions, and the codes of samples."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from numprune.anatomy import code_vocabulary
from numprune.sampling import guided
from numprune.tasks.language import logits_divergence


@torch.inference_mode()
def guided_divergence(
    model: PreTrainedModel, dense: PreTrainedModel, rows: Tensor, scale: float, batch_size: int = 8
) -> float:
    """Return KL(dense || model) of distributions with classifier-free guidance, mean over codes, in nats.

    Args:
        model, dense: class-conditional image generators of one vocabulary.
        rows: (n, S) int64, images that begin with their class.
        scale: of the guidance.
    """
    codes = code_vocabulary(dense.config)
    assert codes is not None
    unconditional = rows.clone()
    unconditional[:, 0] = codes.start

    def logits(one: PreTrainedModel, batch: slice) -> Tensor:
        both = torch.cat([rows[batch], unconditional[batch]]).to(one.device)
        found: Tensor = one(input_ids=both, use_cache=False).logits[:, :-1].float()
        conditional, without_class = found.chunk(2)
        return guided(conditional, without_class, scale)

    batches = [slice(start, start + batch_size) for start in range(0, len(rows), batch_size)]
    found = [logits_divergence(logits(model, batch), logits(dense, batch)) for batch in batches]
    return float(torch.cat(found).mean())


def code_divergence(one: Tensor, other: Tensor, codes: int) -> float:
    """Return the Jensen-Shannon divergence of the frequencies of codes in two sets of images, in nats (0 to ln 2).

    Args:
        one, other: (n, L) int64 codes.
        codes: number of codes.
    """
    p, q = (torch.bincount(images.flatten(), minlength=codes).double() / images.numel() for images in (one, other))
    middle = (p + q) / 2
    return float(sum(torch.special.xlogy(part, part / middle).nansum() for part in (p, q)) / 2)
