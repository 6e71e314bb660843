"""The parts of a Llama-like decoder in standard ONNX operators: portable, and exact for left-padded rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from numprune.export.onnx_decoder import (
    BOOL,
    EMBEDDING,
    FLOAT,
    INT64,
    Layer,
    Writer,
    activate,
    look_up,
    rotary_frequencies,
)
from numprune.export.onnx_graph import Graph


@dataclass(frozen=True)
class Shared:
    """Graph values that all layers use."""

    masks: Mapping[int | None, str]  # by window: (B, 1, S, T) bool, true where a query may attend
    cos: str  # (B, S, D/2)
    sin: str


class StandardOperators:
    """`onnx_decoder.Operators` with one more input, logits_to_keep (kept,): the positions in 0 … S-1 to output."""

    positions = "kept"

    def __init__(self, writer: Writer, layers: Sequence[Layer], tokens: str, mask: str) -> None:
        graph = writer.graph
        self._writer = writer
        self._kept = graph.input("logits_to_keep", INT64, ["kept"])
        masks, positions = _masks_and_positions(graph, tokens, mask, {layer.window for layer in layers})
        self._shared = Shared(masks, *_rotary(writer, positions))

    def embed(self, tokens: str) -> str:
        return look_up(self._writer, tokens)

    def norm(self, name: str, states: str, update: str | None) -> tuple[str, str]:
        if update is not None:
            states = self._writer.graph.op("Add", states, update)
        return _norm(self._writer, name, states), states

    def attention(self, index: int, layer: Layer, normed: str) -> tuple[str, str, str]:
        return _attention(self._writer, self._shared, index, layer, normed)

    def mlp(self, prefix: str, normed: str) -> str:
        writer = self._writer
        gate, up = (_linear(writer, f"{prefix}mlp.{name}", normed) for name in ("gate_proj", "up_proj"))
        return _linear(writer, prefix + "mlp.down_proj", writer.graph.op("Mul", activate(writer, gate), up))

    def head(self, normed: str) -> str:
        # Before the head: it is the largest matrix of a small model.
        return _head(self._writer, self._writer.graph.op("Gather", normed, self._kept, axis=1))


# --- shared by all layers ---------------------------------------------------------------------------


def _masks_and_positions(
    graph: Graph, tokens: str, mask: str, windows: set[int | None]
) -> tuple[dict[int | None, str], str]:
    """Return attention masks (B, 1, S, T) by window and rotary positions (B, S), both from attention_mask (B, T)."""
    new = graph.op("Gather", graph.op("Shape", tokens), graph.integer(1))  # S
    total = graph.op("Gather", graph.op("Shape", mask), graph.integer(1))  # T
    past = graph.op("Sub", total, new)  # P
    one, last_axis = graph.integer(1), graph.integers(-1)
    keys = graph.op("Range", graph.integer(0), total, one)  # (T,)
    queries = graph.op("Unsqueeze", graph.op("Range", past, total, one), last_axis)  # (S, 1)
    causal = graph.op("LessOrEqual", keys, queries)  # (S, T)
    itself = graph.op("Equal", keys, queries)
    valid = graph.op("Unsqueeze", graph.op("Cast", mask, to=BOOL), graph.integers(1, 2))  # (B, 1, 1, T)
    masks = {}
    for window in sorted(windows, key=lambda size: size or 0):
        seen = causal
        if window is not None:
            seen = graph.op("And", causal, graph.op("Greater", graph.op("Add", keys, graph.integer(window)), queries))
        # Padding attends to itself, so that no row is empty: its softmax would be NaN, and 0 * NaN reaches all others.
        masks[window] = graph.op("Or", graph.op("And", valid, seen), itself)
    counted = graph.op("Sub", graph.op("CumSum", mask, one), one)
    counted = graph.op("Max", counted, graph.integer(0))  # (B, T): positions count tokens, not padding
    ends = [graph.op("Unsqueeze", value, graph.integers(0)) for value in (past, total)]
    return masks, graph.op("Slice", counted, *ends, graph.integers(1))


def _rotary(writer: Writer, positions: str) -> tuple[str, str]:
    """Return the cosines and sines (B, S, D/2) of the rotary embedding."""
    graph = writer.graph
    frequencies, scaling = rotary_frequencies(writer)
    inverse = graph.weight("rotary.frequencies", frequencies, torch.float32)  # angles need float32 in any precision
    angles = graph.op("Mul", graph.op("Unsqueeze", graph.op("Cast", positions, to=FLOAT), graph.integers(-1)), inverse)
    cos, sin = graph.op("Cos", angles), graph.op("Sin", angles)
    if scaling != 1.0:
        cos, sin = (graph.op("Mul", value, graph.scalar(scaling)) for value in (cos, sin))
    return graph.rounded(cos), graph.rounded(sin)


# --- one layer ---------------------------------------------------------------------------------------


def _attention(writer: Writer, shared: Shared, index: int, layer: Layer, hidden: str) -> tuple[str, str, str]:
    """Return the block's output (B, S, H), and past and new keys and values (B, N, T, D)."""
    graph, prefix = writer.graph, f"model.layers.{index}.self_attn."
    query, key, value = (
        _heads(writer, _linear(writer, prefix + name, hidden), count)
        for name, count in (("q_proj", layer.heads), ("k_proj", layer.kv_heads), ("v_proj", layer.kv_heads))
    )
    if prefix + "q_norm.weight" in writer.stored:
        query, key = _norm(writer, prefix + "q_norm", query), _norm(writer, prefix + "k_norm", key)
    shape: list[int | str] = ["batch", layer.kv_heads, "past", writer.head_dim]
    past_key, past_value = (
        graph.input(f"past_key_values.{index}.{name}", graph.element, shape) for name in ("key", "value")
    )
    key = graph.op("Concat", past_key, _rotate(writer, shared, key), axis=2)
    value = graph.op("Concat", past_value, value, axis=2)
    mixed = _attend(writer, shared, layer, _rotate(writer, shared, query), key, value)
    mixed = graph.op("Reshape", graph.op("Transpose", mixed, perm=[0, 2, 1, 3]), graph.integers(0, 0, -1))
    return _linear(writer, prefix + "o_proj", mixed), key, value


def _heads(writer: Writer, states: str, heads: int) -> str:
    """(B, S, heads * D) -> (B, heads, S, D)."""
    graph = writer.graph
    split = graph.op("Reshape", states, graph.integers(0, 0, heads, writer.head_dim))
    return graph.op("Transpose", split, perm=[0, 2, 1, 3])


def _attend(writer: Writer, shared: Shared, layer: Layer, query: str, key: str, value: str) -> str:
    """Grouped-query attention: (B, heads, S, D), (B, N, T, D), (B, N, T, D) -> (B, heads, S, D)."""
    graph, head_dim = writer.graph, writer.head_dim
    mask, scale = shared.masks[layer.window], head_dim**-0.5
    if writer.opset >= 23:
        precision = {} if graph.dtype == torch.float32 else {"softmax_precision": FLOAT}
        return graph.op("Attention", query, key, value, mask, scale=scale, **precision)
    # The query heads of a group are adjacent, so a group's queries are rows of one matrix.
    group = layer.heads // layer.kv_heads
    rows = graph.op("Reshape", query, graph.integers(0, layer.kv_heads, -1, head_dim))  # (B, N, G*S, D)
    rows = graph.op("Mul", rows, graph.scalar(scale, graph.dtype))
    scores = graph.op("MatMul", rows, graph.op("Transpose", key, perm=[0, 1, 3, 2]))  # (B, N, G*S, T)
    total = graph.op("Slice", graph.op("Shape", scores), graph.integers(3), graph.integers(4))
    lead = graph.op("Slice", graph.op("Shape", query), graph.integers(0), graph.integers(1))
    length = graph.op("Slice", graph.op("Shape", query), graph.integers(2), graph.integers(3))
    by_head = graph.op("Concat", lead, graph.integers(layer.heads), length, total, axis=0)
    by_group = graph.op("Concat", lead, graph.integers(layer.kv_heads), graph.integers(-1), total, axis=0)
    scores = graph.float32(graph.op("Reshape", scores, by_head))  # (B, heads, S, T)
    scores = graph.op("Where", mask, scores, graph.scalar(torch.finfo(torch.float32).min))
    weights = graph.op("Reshape", graph.rounded(graph.op("Softmax", scores, axis=-1)), by_group)
    mixed = graph.op("MatMul", weights, value)  # (B, N, G*S, D)
    shape = graph.op("Concat", lead, graph.integers(layer.heads), length, graph.integers(head_dim), axis=0)
    return graph.op("Reshape", mixed, shape) if group > 1 else mixed


def _rotate(writer: Writer, shared: Shared, states: str) -> str:
    """Apply the rotary embedding to (B, heads, S, D); the two halves of a head are the real and imaginary parts."""
    graph = writer.graph
    if writer.opset >= 23:
        return graph.op("RotaryEmbedding", states, shared.cos, shared.sin)
    cos, sin = (graph.op("Unsqueeze", value, graph.integers(1)) for value in (shared.cos, shared.sin))  # (B, 1, S, D/2)
    real, imaginary = graph.split("Split", states, outputs=2, axis=-1, num_outputs=2)
    turned_real = graph.op("Sub", graph.op("Mul", real, cos), graph.op("Mul", imaginary, sin))
    turned_imaginary = graph.op("Add", graph.op("Mul", imaginary, cos), graph.op("Mul", real, sin))
    return graph.op("Concat", turned_real, turned_imaginary, axis=-1)


def _norm(writer: Writer, name: str, states: str) -> str:
    """Root-mean-square norm over the last axis."""
    graph, epsilon = writer.graph, writer.config.rms_norm_eps
    weight = graph.weight(name + ".weight", writer.tensor(name + ".weight"))
    if writer.opset >= 23:
        return graph.op("RMSNormalization", states, weight, axis=-1, epsilon=epsilon)
    states = graph.float32(states)
    square = graph.op("ReduceMean", graph.op("Mul", states, states), graph.integers(-1))
    root = graph.op("Sqrt", graph.op("Add", square, graph.scalar(epsilon)))
    return graph.op("Mul", graph.rounded(graph.op("Div", states, root)), weight)


def _linear(writer: Writer, name: str, states: str) -> str:
    """x Wᵀ + b. W is stored transposed, as MatMul expects it."""
    graph = writer.graph
    result = graph.op("MatMul", states, graph.weight(name + ".weight.T", writer.tensor(name + ".weight").T))
    if name + ".bias" in writer.stored:
        result = graph.op("Add", result, graph.weight(name + ".bias", writer.tensor(name + ".bias")))
    return result


def _head(writer: Writer, hidden: str) -> str:
    """Return the logits (B, kept, V)."""
    graph, config = writer.graph, writer.config
    if not config.tie_word_embeddings:
        return _linear(writer, "lm_head", hidden)
    # Gemm reads the embedding as it is, so that tied weights are one initializer.
    logits = graph.op("Gemm", graph.op("Reshape", hidden, graph.integers(-1, config.hidden_size)), EMBEDDING, transB=1)
    rows = graph.op("Slice", graph.op("Shape", hidden), graph.integers(0), graph.integers(2))  # (B, kept)
    return graph.op("Reshape", logits, graph.op("Concat", rows, graph.integers(config.vocab_size), axis=0))
