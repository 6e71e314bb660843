"""A Llama-like decoder with its KV cache in ONNX, written from the configuration and the weights.

This module defines the network; `onnx_standard` and `onnx_fused` choose the operators for its parts.

It is written directly instead of traced (as `onnx_traced` does for every other network), because these families are one
network with or without some biases, norms and windows. Tracing an 8-layer model takes about 20 s of CPU time and the
whole model in memory; this takes well under a second and one tensor. `parity` proves that the graph computes what the
checkpoint computes.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from onnx import TensorProto
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from numprune.anatomy import family_of
from numprune.errors import InputError
from numprune.export.onnx_graph import Graph

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")
OPSETS = (20, 23)  # 23 has Attention, RMSNormalization and RotaryEmbedding; 24 is not handled well everywhere

EMBEDDING = "model.embed_tokens.weight"
FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL


@dataclass(frozen=True)
class Layer:
    """Sizes of one decoder layer."""

    heads: int
    kv_heads: int
    window: int | None  # sliding window in positions
    skip: Collection[str]  # "attention" and "mlp", where the layer does without


@dataclass(frozen=True)
class Writer:
    """The inputs shared by the writers of all parts of the network."""

    graph: Graph
    opset: int
    config: Any
    stored: frozenset[str]  # names of the checkpoint's tensors
    tensor: Callable[[str], Tensor]  # one of them
    head_dim: int


class Operators(Protocol):
    """How the parts of the network are computed with one set of operators; strings are names of graph values."""

    @property
    def positions(self) -> int | str:
        """The number of logit positions, or the name of the graph's dimension."""

    def embed(self, tokens: str) -> str:
        """Return the embeddings (B, S, H)."""

    def norm(self, name: str, states: str, update: str | None) -> tuple[str, str]:
        """Add the last block's output to the residual stream (B, S, H): the norm of the sum, and the sum."""

    def attention(self, index: int, layer: Layer, normed: str) -> tuple[str, str, str]:
        """Return the block's output (B, S, H), and past and new keys and values (B, N_l, T, D)."""

    def mlp(self, prefix: str, normed: str) -> str:
        """Return the block's output (B, S, H)."""

    def head(self, normed: str) -> str:
        """Return the logits at the positions that the graph outputs."""


Flavour = Callable[[Writer, Sequence[Layer], str, str], Operators]


def writes(config: Any) -> bool:
    """Return whether `write_decoder` supports the network of a configuration."""
    return family_of(config).name in FAMILIES and config.hidden_act in ACTIVATIONS and turns_all(config)


def turns_all(config: Any) -> bool:
    """Return whether all layers have rotary positions; some of a SmolLM3 may have none."""
    return all(getattr(config, "no_rope_layers", ()))


def head_dim_of(config: Any) -> int:
    """Return the size of a head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def write_decoder(
    graph: Graph,
    config: Any,
    stored: frozenset[str],
    tensor: Callable[[str], Tensor],
    opset: int,
    flavour: Flavour,
) -> None:
    """Add the whole network to `graph`.

    Inputs: input_ids (B, S), attention_mask (B, T; 1 = token, 0 = padding), those of the operators, and
    past_key_values.l.key and .value (B, N_l, P, D). Outputs: logits (B, positions, V), present.l.key and .value
    (B, N_l, T, D), for the layers l that have attention. Logits are float32, the rest is in the graph's precision.
    Norms, softmax and rotary angles are computed in float32, as in PyTorch.

    Args:
        graph: an empty one.
        config: of the checkpoint; `writes` accepts it.
        stored: the names of its tensors.
        tensor: returns one of them by name.
        opset: one of OPSETS.
        flavour: creates the operators and their own inputs from the layers and the names of tokens and mask.

    Raises:
        InputError: a setting of the configuration is not supported.
    """
    head_dim = head_dim_of(config)
    writer = Writer(graph, opset, config, stored, tensor, head_dim)
    layers = _layers(config)
    tokens = graph.input("input_ids", INT64, ["batch", "sequence"])
    mask = graph.input("attention_mask", INT64, ["batch", "total"])
    operators = flavour(writer, layers, tokens, mask)

    states = operators.embed(tokens)
    update: str | None = None
    present: dict[int, list[str]] = {}
    for index, layer in enumerate(layers):
        prefix = f"model.layers.{index}."
        if "attention" not in layer.skip:
            normed, states = operators.norm(prefix + "input_layernorm", states, update)
            update, *present[index] = operators.attention(index, layer, normed)
        if "mlp" not in layer.skip:
            normed, states = operators.norm(prefix + "post_attention_layernorm", states, update)
            update = operators.mlp(prefix, normed)
    normed, _ = operators.norm("model.norm", states, update)
    logits = operators.head(normed)

    graph.output(graph.float32(logits), "logits", FLOAT, ["batch", operators.positions, config.vocab_size])
    for index, cached in present.items():
        for name, value in zip(("key", "value"), cached, strict=True):
            shape: list[int | str] = ["batch", layers[index].kv_heads, "total", head_dim]
            graph.output(value, f"present.{index}.{name}", graph.element, shape)


def _layers(config: Any) -> list[Layer]:
    layers = []
    for index in range(config.num_hidden_layers):
        sizes = config.per_layer_config[index]
        types = getattr(config, "layer_types", None)
        slides = types[index] == "sliding_attention" if types else True
        window = getattr(config, "sliding_window", None) if slides else None
        heads, kv_heads = sizes.num_attention_heads, sizes.num_key_value_heads or sizes.num_attention_heads
        layers.append(Layer(heads, kv_heads, window, getattr(sizes, "skip", ())))
    return layers


# --- shared by all operators -------------------------------------------------------------------------


def look_up(writer: Writer, tokens: str) -> str:
    """Return the unquantized embeddings (B, S, H)."""
    return writer.graph.op("Gather", writer.graph.weight(EMBEDDING, writer.tensor(EMBEDDING)), tokens)


def rotary_frequencies(writer: Writer) -> tuple[Tensor, float]:
    """Return the inverse frequencies (D/2,) of the rotary embedding and the factor of its cosines and sines."""
    config, head_dim = writer.config, writer.head_dim
    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        frequencies = config.rope_parameters["rope_theta"] ** (-torch.arange(0, head_dim, 2).double() / head_dim)
        scaling = 1.0
    else:
        frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    if frequencies.shape != (head_dim // 2,):
        raise InputError("config.json: rotary embeddings over part of a head are not supported in ONNX")
    return frequencies, scaling


def activate(writer: Writer, values: str) -> str:
    graph = writer.graph
    match writer.config.hidden_act:
        case "silu":
            return graph.op("Mul", values, graph.op("Sigmoid", values))
        case "gelu":
            return graph.op("Gelu", values)
        case "gelu_pytorch_tanh":
            return graph.op("Gelu", values, approximate="tanh")
        case "relu":
            return graph.op("Relu", values)
    raise ValueError(f"not among {ACTIVATIONS}")
