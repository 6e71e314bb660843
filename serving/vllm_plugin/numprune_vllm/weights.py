"""Weights on their way into vLLM, each compared with the configuration first.

vLLM's loaders narrow what is too large to the size they expect, leave what is missing of a fused matrix uninitialised
and drop biases they have no place for, all without an error. Nothing gets that far here.
"""

import re
from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
_COMPUTED = re.compile(r"rotary_emb\.inv_freq$")  # a buffer that older versions of transformers stored


def checked(
    weights: Iterable[tuple[str, Tensor]], shapes: Mapping[str, tuple[int, ...]], *, tied: bool
) -> Iterator[tuple[str, Tensor]]:
    """Pass on `weights`, which must be exactly those of `shapes`, each once, in any order.

    A tied output matrix may be absent; when present it must equal the embedding, and is not passed on.

    Raises:
        ValueError: names the tensor that is unexpected, of another shape, there twice or missing.
    """
    seen: set[str] = set()
    twins: dict[str, Tensor] = {}
    for name, tensor in weights:
        if _COMPUTED.search(name):
            continue
        if name not in shapes:
            raise ValueError(f"{name}: stored, but it has no place in the model that config.json describes")
        if tuple(tensor.shape) != shapes[name]:
            raise ValueError(
                f"{name}: stored with shape {list(tensor.shape)}, but config.json means {list(shapes[name])}"
            )
        if name in seen:
            raise ValueError(f"{name}: stored twice")
        seen.add(name)
        if tied and name in (EMBEDDING, OUTPUT):
            twins[name] = tensor
            if len(twins) == 2 and not twins[EMBEDDING].equal(twins[OUTPUT]):
                raise ValueError(f"{OUTPUT}: differs from {EMBEDDING}, but config.json ties them")
            if name == OUTPUT:
                continue
        yield name, tensor
    missing = sorted(shapes.keys() - seen - ({OUTPUT} if tied else set()))
    if missing:
        raise ValueError(
            f"{missing[0]} {list(shapes[missing[0]])}: not stored, but config.json needs it"
            + (f" ({len(missing) - 1} more are missing)" if len(missing) > 1 else "")
        )
