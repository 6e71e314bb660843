"""Convert the published state dict of a class-conditional LlamaGen to that of `LlamaGenForCausalLM`.

The published model rotates channels 2i and 2i + 1 of a head together, transformers channels i and i + D / 2. So the
rows of queries and keys are permuted, head by head; their products stay the same.
"""

import re
from collections.abc import Iterator, Mapping
from math import isqrt

import torch
from torch import Tensor

from numprune.errors import InputError
from numprune.llamagen.config import LlamaGenConfig

# Query heads by hidden size and number of layers (FoundationVision/LlamaGen, autoregressive/models/gpt.py): GPT-B, -L,
# -XL, -XXL, -1B, -XXXL, -3B, -7B. None has KV groups.
PUBLISHED_HEADS = {
    (768, 12): 12,
    (1024, 24): 16,
    (1280, 36): 20,
    (1536, 48): 24,
    (2048, 22): 32,
    (2560, 48): 40,
    (3200, 24): 32,
    (4096, 32): 32,
}

_CODES, _CLASSES = "tok_embeddings.weight", "cls_embedding.embedding_table.weight"
_AROUND = {"norm.weight": "model.norm.weight", "output.weight": "lm_head.weight"}
_IN_LAYER = {
    "attention.wo.weight": "self_attn.o_proj.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
_FUSED = "attention.wqkv.weight"
_ROTARY = "freqs_cis"  # (1 + codes, D / 2, 2): some files have the rotary table, which is computed here
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")


def config_of(state: Mapping[str, Tensor], codes_per_image: int, heads: int | None = None) -> LlamaGenConfig:
    """Return the configuration of a published state dict.

    Args:
        state: tensors by their published names.
        codes_per_image: 256 for images of 256 pixels a side, 576 for 384; the state dict does not say.
        heads: number of query heads; None: that of the rotary table, or of the published model of this size. Except
            for these two, the state dict does not say it.

    Raises InputError.
    """
    if any(name.startswith("cls_embedding.cap_proj.") for name in state):
        raise InputError("the state dict is of a text-conditional LlamaGen; only class-conditional ones are supported")
    layers = {int(match[1]) for name in state if (match := _LAYER.fullmatch(name))}
    expected = {_CODES, _CLASSES, *_AROUND}
    expected |= {f"layers.{layer}.{name}" for layer in range(len(layers)) for name in (_FUSED, *_IN_LAYER)}
    missing, unknown = sorted(expected - state.keys()), sorted(state.keys() - expected - {_ROTARY})
    if missing or unknown or not layers:
        found = [f"lacks {missing[0]!r}"] if missing else []
        found += [f"has the unknown {unknown[0]!r}"] if unknown else []
        raise InputError(f"the state dict is not of a class-conditional LlamaGen: it {' and '.join(found)}")
    _check_shapes(state, len(layers))
    codes, hidden = state[_CODES].shape
    heads = _heads(state, hidden, len(layers), codes_per_image, heads)
    if heads < 1 or hidden % (4 * heads):
        raise InputError(f"heads: {heads} do not divide the hidden size {hidden} into multiples of 4 channels")
    head_dim, rows = hidden // heads, state[f"layers.0.{_FUSED}"].shape[0]
    kv_heads, rest = divmod(rows - hidden, 2 * head_dim)
    if rest or kv_heads < 1 or heads % kv_heads:
        raise InputError(f"heads: {heads} heads do not fit {_FUSED}, which has {rows} rows; give the right number")
    if isqrt(codes_per_image) ** 2 != codes_per_image:
        raise InputError(f"codes per image: {codes_per_image} are not those of a square image, such as 256 or 576")
    return LlamaGenConfig(
        vocab_size=codes + len(state[_CLASSES]),
        num_classes=len(state[_CLASSES]) - 1,
        hidden_size=hidden,
        intermediate_size=len(state["layers.0.feed_forward.w1.weight"]),
        num_hidden_layers=len(layers),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=1 + codes_per_image,
        architectures=["LlamaGenForCausalLM"],
    )


def _heads(state: Mapping[str, Tensor], hidden: int, layers: int, codes_per_image: int, asked: int | None) -> int:
    """Return the number of query heads. Raises InputError where it is unknown, or not the one asked for."""
    found = PUBLISHED_HEADS.get((hidden, layers)) if len(state[f"layers.0.{_FUSED}"]) == 3 * hidden else None
    source = f"the published model with hidden size {hidden} and {layers} layers has"
    if (table := state.get(_ROTARY)) is not None:
        if table.ndim != 3 or table.shape[::2] != (1 + codes_per_image, 2) or hidden % max(1, 2 * table.shape[1]):
            raise InputError(
                f"{_ROTARY} has shape {list(table.shape)}; for {codes_per_image} codes per image and the hidden size "
                f"{hidden}, it must be [{1 + codes_per_image}, D / 2, 2], where D divides {hidden}"
            )
        found, source = hidden // (2 * table.shape[1]), f"{_ROTARY} is of"
    if asked is not None and found is not None and asked != found:
        raise InputError(f"heads: {asked} were given, but {source} {found}; omit them")
    if (heads := asked or found) is None:
        known = ", ".join(f"{width} with {depth}" for width, depth in PUBLISHED_HEADS)
        raise InputError(
            f"heads: no published LlamaGen has the hidden size {hidden} with {layers} layers (they have {known}); give "
            "the number of heads that it was trained with, which the state dict does not say"
        )
    return heads


def _check_shapes(state: Mapping[str, Tensor], layers: int) -> None:
    """Raise InputError for the first tensor whose shape does not fit the others."""
    matrices = [_CODES, _CLASSES, f"layers.0.{_FUSED}", "layers.0.feed_forward.w1.weight"]
    for name in matrices:
        if state[name].ndim != 2:
            raise InputError(f"{name} has shape {list(state[name].shape)}; it must be a matrix")
    codes, classes, fused, width = (len(state[name]) for name in matrices)
    hidden = state[_CODES].shape[1]
    shapes: dict[str, tuple[int, ...]] = {
        _CODES: (codes, hidden),
        _CLASSES: (classes, hidden),
        "norm.weight": (hidden,),
        "output.weight": (codes, hidden),
    }
    for layer in range(layers):
        shapes |= {
            f"layers.{layer}.{name}": shape
            for name, shape in {
                _FUSED: (fused, hidden),
                "attention.wo.weight": (hidden, hidden),
                "feed_forward.w1.weight": (width, hidden),
                "feed_forward.w3.weight": (width, hidden),
                "feed_forward.w2.weight": (hidden, width),
                "attention_norm.weight": (hidden,),
                "ffn_norm.weight": (hidden,),
            }.items()
        }
    for name, shape in shapes.items():
        if state[name].shape != shape:
            raise InputError(f"{name} has shape {list(state[name].shape)}; the other tensors need {list(shape)}")


def converted(state: Mapping[str, Tensor], config: LlamaGenConfig) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a published state dict by their names in `LlamaGenForCausalLM`."""
    yield "model.embed_tokens.weight", torch.cat([state[_CODES], state[_CLASSES]])
    yield from ((name, state[published]) for published, name in _AROUND.items())
    head_dim, heads, kv_heads = config.head_dim, config.num_attention_heads, config.num_key_value_heads
    for layer in range(config.num_hidden_layers):
        before, after = f"layers.{layer}.", f"model.layers.{layer}."
        query, key, value = state[before + _FUSED].split([head_dim * count for count in (heads, kv_heads, kv_heads)])
        yield f"{after}self_attn.q_proj.weight", half_split(query, head_dim)
        yield f"{after}self_attn.k_proj.weight", half_split(key, head_dim)
        yield f"{after}self_attn.v_proj.weight", value.contiguous()
        yield from ((after + name, state[before + published]) for published, name in _IN_LAYER.items())


def half_split(weight: Tensor, head_dim: int) -> Tensor:
    """Return rows (heads * D, H) in the order 0, 2, …, D - 2, 1, 3, …, D - 1 within each head."""
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2).contiguous()
