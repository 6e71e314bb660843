"""The parts of a Llama-like decoder in ONNX Runtime's own operators: attention updates its cache in place.

The graph takes rows padded on the right and outputs the logits of each row's last token only, which is what generation
needs and onnxruntime-genai expects. Matrices with the same input are merged: when a single token is decoded, each
operator saved is worth more than its share of the work.

Quantized matrices keep their values. Their inputs are rounded to 8 bits in blocks for the products, which is the only
fast way. The output matrix is then quantized, too: otherwise it would take most of a token's time. It is stored in 4
bits if the checkpoint's values are on such a grid, together with an embedding tied to it, and else rounded to 8 bits.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from onnx import TensorProto
from torch import Tensor

from numprune.errors import IntegrityError
from numprune.export.headers import QuantizedHeader
from numprune.export.onnx_decoder import Layer, Writer, activate, look_up, rotary_frequencies
from numprune.export.onnx_quantized import BLOCK_SIZE, Blocked, blocked
from numprune.export.weights import read_quantized
from numprune.quantization import Quantized, Scheme, lm_head, round_to_nearest

_HEAD = Scheme("w8a8")  # of the output matrix, if others are quantized
_HEAD_BLOCK = 64  # of that matrix; its rows have one scale, so only its inputs are rounded more coarsely than in 32
_INT8 = 4  # accuracy_level of MatMulNBits: 4 rounds inputs to int8


class FusedOperators:
    """`onnx_decoder.Operators` with ONNX Runtime's own operators."""

    positions = 1  # a constant: onnxruntime-genai concludes from it that only the last logits are returned

    def __init__(
        self,
        quantized: Mapping[str, QuantizedHeader],
        output: Quantized | None,
        writer: Writer,
        layers: Sequence[Layer],
        tokens: str,
        mask: str,
    ) -> None:
        """Arguments other than the following are those of `onnx_decoder.Flavour`.

        Args:
            quantized: the checkpoint's quantized matrices.
            output: returned by `output_matrix`.
        """
        graph = writer.graph
        self._quantized = quantized
        self._output = output
        self._writer = writer
        one, last_axis = graph.integer(1), graph.integers(-1)
        before_last = graph.op("Sub", graph.op("ReduceSum", mask, graph.integers(1), keepdims=0), one)  # (B,)
        total = graph.op("Gather", graph.op("Shape", mask), one)  # T
        past = graph.op("Sub", total, graph.op("Gather", graph.op("Shape", tokens), one))  # P
        # Index of each row's last token among the new ones. After a ragged prompt, P exceeds the length of a short row,
        # and each row continues with one token, at index 0.
        last = graph.op("Max", graph.op("Sub", before_last, past), graph.integer(0))
        self._last = graph.op("Unsqueeze", graph.op("Unsqueeze", last, last_axis), last_axis)  # (B, 1, 1)
        self._before_last = graph.op("Cast", before_last, to=TensorProto.INT32)
        self._total = graph.op("Cast", total, to=TensorProto.INT32)
        self._rotary = _rotary_tables(writer)

    def embed(self, tokens: str) -> str:
        if self._output is None or self._output.scheme.bits != 4 or not self._writer.config.tie_word_embeddings:
            return look_up(self._writer, tokens)
        graph = self._writer.graph
        values, scales, found = self._stored(head_of(self._writer.config), self._output)
        rows = graph.op("Reshape", values, graph.integers(*found.values.flatten(1).shape))
        return graph.fused(
            "GatherBlockQuantized",
            rows,
            tokens,
            scales,
            bits=found.bits,
            block_size=found.size,
            gather_axis=0,
            quantize_axis=1,
        )[0]

    def norm(self, name: str, states: str, update: str | None) -> tuple[str, str]:
        graph, epsilon = self._writer.graph, self._writer.config.rms_norm_eps
        weight = self._weight(name)
        if update is None:
            return graph.op("RMSNormalization", states, weight, axis=-1, epsilon=epsilon), states
        normed, _, _, total = graph.fused(
            "SkipSimplifiedLayerNormalization", states, update, weight, outputs=4, epsilon=epsilon
        )
        return normed, total

    def attention(self, index: int, layer: Layer, normed: str) -> tuple[str, str, str]:
        writer, graph, prefix = self._writer, self._writer.graph, f"model.layers.{index}.self_attn."
        states = [self._linear([prefix + name for name in ("q_proj", "k_proj", "v_proj")], normed), "", ""]
        if prefix + "q_norm.weight" in writer.stored:
            states = self._norm_heads(prefix, layer, states[0])
        shape: list[int | str] = ["batch", layer.kv_heads, "past", writer.head_dim]
        mixed, key, value = graph.fused(
            "GroupQueryAttention",
            *states,
            *(graph.input(f"past_key_values.{index}.{name}", graph.element, shape) for name in ("key", "value")),
            self._before_last,
            self._total,
            *self._rotary,
            outputs=3,
            num_heads=layer.heads,
            kv_num_heads=layer.kv_heads,
            scale=writer.head_dim**-0.5,
            do_rotary=1,
            local_window_size=-1 if layer.window is None else layer.window,
        )
        return self._linear([prefix + "o_proj"], mixed), key, value

    def mlp(self, prefix: str, normed: str) -> str:
        graph = self._writer.graph
        joined = self._linear([prefix + "mlp.gate_proj", prefix + "mlp.up_proj"], normed)
        gate, up = graph.split("Split", joined, outputs=2, axis=-1, num_outputs=2)
        return self._linear([prefix + "mlp.down_proj"], graph.op("Mul", activate(self._writer, gate), up))

    def head(self, normed: str) -> str:
        last = self._writer.graph.op("GatherND", normed, self._last, batch_dims=1)  # (B, 1, H)
        name = head_of(self._writer.config)
        return self._linear([name], last) if self._output is None else self._product_of_blocks(name, self._output, last)

    def _norm_heads(self, prefix: str, layer: Layer, joined: str) -> list[str]:
        """Return queries, keys and values (B, S, heads * D) from the merged matrix; queries and keys normed by head."""
        graph, head_dim = self._writer.graph, self._writer.head_dim
        counts = (layer.heads, layer.kv_heads, layer.kv_heads)
        sizes = graph.integers(*(count * head_dim for count in counts))
        states = graph.split("Split", joined, sizes, outputs=3, axis=-1)
        for place, name in enumerate(("q_norm", "k_norm")):
            heads = graph.op("Reshape", states[place], graph.integers(0, 0, counts[place], head_dim))
            normed, _ = self.norm(prefix + name, heads, None)
            states[place] = graph.op("Reshape", normed, graph.integers(0, 0, -1))
        return states

    def _linear(self, names: Sequence[str], states: str) -> str:
        """x [W; …]ᵀ + [b; …]."""
        writer, graph = self._writer, self._writer.graph
        alike = [list(group) for _, group in groupby(names, self._scheme)]  # usually a single group
        products = [self._product(group, states) for group in alike]
        result = products[0] if len(products) == 1 else graph.op("Concat", *products, axis=-1)
        if f"{names[0]}.bias" not in writer.stored:
            return result
        bias = torch.cat([writer.tensor(f"{name}.bias") for name in names])
        return graph.op("Add", result, graph.weight(f"{'+'.join(names)}.bias", bias))

    def _product(self, names: Sequence[str], states: str) -> str:
        """x [W; …]ᵀ for matrices of one storage format."""
        joined, scheme = "+".join(names), self._scheme(names[0])
        if scheme is None:  # MatMul reads it transposed
            matrix = torch.cat([self._writer.tensor(f"{name}.weight") for name in names])
            return self._writer.graph.op("MatMul", states, self._writer.graph.weight(f"{joined}.weight.T", matrix.T))
        parts = [_read(self._quantized[f"{name}.weight"]) for name in names]
        values, scales = torch.cat([part.values for part in parts]), torch.cat([part.scales for part in parts])
        return self._product_of_blocks(joined, Quantized(scheme, values, scales), states)

    def _product_of_blocks(self, name: str, matrix: Quantized, states: str) -> str:
        values, scales, found = self._stored(name, matrix)
        return self._writer.graph.fused(
            "MatMulNBits", states, values, scales, accuracy_level=_INT8, **found.attributes
        )[0]

    def _stored(self, name: str, matrix: Quantized) -> tuple[str, str, Blocked]:
        """Return the initializers of values and scales."""
        graph = self._writer.graph
        found = blocked(matrix, _HEAD_BLOCK if matrix is self._output else BLOCK_SIZE)
        values = graph.weight(f"{name}.weight.values", found.values, torch.uint8)
        return values, graph.weight(f"{name}.weight.scales", found.scales), found

    def _scheme(self, name: str) -> Scheme | None:
        header = self._quantized.get(f"{name}.weight")
        return header.scheme if header else None

    def _weight(self, name: str) -> str:
        return self._writer.graph.weight(f"{name}.weight", self._writer.tensor(f"{name}.weight"))


def output_matrix(
    config: Any, quantized: Mapping[str, QuantizedHeader], tensor: Callable[[str], Tensor]
) -> Quantized | None:
    """Return the output matrix as the export stores it; None: unquantized, as no other matrix is.

    Args:
        quantized: the checkpoint's quantized matrices.
        tensor: returns one of the checkpoint's tensors by name.
    """
    name = f"{head_of(config)}.weight"
    if not quantized:
        return None
    if name in quantized:
        return _read(quantized[name])
    weight = tensor(name)
    return lm_head.on_grid(weight) or round_to_nearest(weight, _HEAD)


def head_of(config: Any) -> str:
    """Return the name of the module whose matrix produces the logits."""
    return "model.embed_tokens" if config.tie_word_embeddings else "lm_head"


def _read(header: QuantizedHeader) -> Quantized:
    """Return the matrix as stored. Raises IntegrityError if a scale is NaN or infinite."""
    matrix = read_quantized(header, 0, header.rows)
    if not torch.isfinite(matrix.scales).all():
        raise IntegrityError(f"{header.file}: the scales of {header.name} are NaN or infinite")
    return matrix


def _rotary_tables(writer: Writer) -> list[str]:
    """Return the cosines and sines (positions, D/2) of the rotary embedding."""
    frequencies, scaling = rotary_frequencies(writer)
    angles = torch.arange(writer.config.max_position_embeddings).double()[:, None] * frequencies.double()
    return [
        writer.graph.weight("rotary.cos", angles.cos() * scaling),
        writer.graph.weight("rotary.sin", angles.sin() * scaling),
    ]
