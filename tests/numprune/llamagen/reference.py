"""LlamaGen written out from its description, with the published names of tensors: what a conversion must compute."""

import torch
from torch import Tensor

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, WIDTH, LAYERS = 4, 2, 16, 64, 96, 2
CODES, CLASSES, GRID = 40, 3, 4


def random_state(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, around: float = 0.0) -> Tensor:
        return around + 0.2 * torch.randn(shape, generator=generator)

    state = {
        "cls_embedding.embedding_table.weight": normal(CLASSES + 1, HIDDEN),
        "tok_embeddings.weight": normal(CODES, HIDDEN),
        "norm.weight": normal(HIDDEN, around=1),
        "output.weight": normal(CODES, HIDDEN),
    }
    for layer in range(LAYERS):
        state |= {
            f"layers.{layer}.attention.wqkv.weight": normal((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN),
            f"layers.{layer}.attention.wo.weight": normal(HIDDEN, HIDDEN),
            f"layers.{layer}.feed_forward.w1.weight": normal(WIDTH, HIDDEN),
            f"layers.{layer}.feed_forward.w3.weight": normal(WIDTH, HIDDEN),
            f"layers.{layer}.feed_forward.w2.weight": normal(HIDDEN, WIDTH),
            f"layers.{layer}.attention_norm.weight": normal(HIDDEN, around=1),
            f"layers.{layer}.ffn_norm.weight": normal(HIDDEN, around=1),
        }
    return state


def logits(state: dict[str, Tensor], labels: Tensor, codes: Tensor) -> Tensor:
    """(n, 1 + L, CODES): at the class (n,), where CLASSES means none, and at each code (n, L)."""
    embedded = state["cls_embedding.embedding_table.weight"][labels][:, None]
    hidden = torch.cat([embedded, state["tok_embeddings.weight"][codes]], 1)
    length = hidden.shape[1]
    turns = _turns()[:length]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    for layer in range(LAYERS):
        weights = {name.split(".", 2)[2]: value for name, value in state.items() if name.startswith(f"layers.{layer}.")}
        read = _norm(hidden, weights["attention_norm.weight"])
        fused = read @ weights["attention.wqkv.weight"].T
        heads = fused.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)  # (n, heads, S, D)
        query, key, value = heads.split([HEADS, KV_HEADS, KV_HEADS], 1)
        query, key = _turned(query, turns), _turned(key, turns)
        key, value = (part.repeat_interleave(HEADS // KV_HEADS, 1) for part in (key, value))
        scores = (query @ key.transpose(-1, -2) / HEAD_DIM**0.5).masked_fill(~causal, -torch.inf)
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        hidden = hidden + mixed @ weights["attention.wo.weight"].T
        read = _norm(hidden, weights["ffn_norm.weight"])
        gate, up = read @ weights["feed_forward.w1.weight"].T, read @ weights["feed_forward.w3.weight"].T
        hidden = hidden + (torch.nn.functional.silu(gate) * up) @ weights["feed_forward.w2.weight"].T
    return _norm(hidden, state["norm.weight"]) @ state["output.weight"].T


def _turns() -> Tensor:
    """(1 + GRID^2, D / 2) complex: zero at the class, then e^(i angle), by row in the first half and by column."""
    table = torch.zeros(1 + GRID * GRID, HEAD_DIM // 2, dtype=torch.complex64)
    quarter = HEAD_DIM // 4
    for row in range(GRID):
        for column in range(GRID):
            for index in range(quarter):
                speed = 10000 ** (-2 * index / (HEAD_DIM // 2))
                for offset, place in ((0, row), (quarter, column)):
                    angle = torch.tensor(place * speed)
                    table[1 + row * GRID + column, offset + index] = torch.polar(torch.tensor(1.0), angle)
    return table


def _turned(heads: Tensor, turns: Tensor) -> Tensor:
    """Channels 2i and 2i + 1 as one complex number."""
    pairs = torch.view_as_complex(heads.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turns).flatten(-2)


def _norm(hidden: Tensor, weight: Tensor) -> Tensor:
    return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-5) * weight
