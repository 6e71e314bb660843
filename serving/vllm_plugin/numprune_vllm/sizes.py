"""What a configuration says of each layer's sizes, of every stored tensor's shape, and of how it can be split.

Neither vLLM nor numprune is needed. Shapes are those of the checkpoint: [out, in] for a matrix.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

PREFIX = "numprune_"  # of the model types whose layers differ
PER_LAYER = {"num_attention_heads", "num_key_value_heads", "intermediate_size"}
SKIPPED = {"attention": ("input_layernorm", "self_attn"), "mlp": ("post_attention_layernorm", "mlp")}
_LAYER = "model.layers.0."  # of a model that has one

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Expected:
    """The tensors of a checkpoint.

    Attributes:
        shapes: of every tensor by name; of tied ones, too.
        tied: name of a tensor that need not be stored -> of the one that it equals.
    """

    shapes: Shapes
    tied: Mapping[str, str]


@dataclass(frozen=True)
class Biases:
    qkv: bool
    output: bool
    mlp: bool


@dataclass(frozen=True)
class LayerSizes:
    """Of one decoder layer; no heads: its attention is skipped; no width: its MLP is."""

    query_heads: int
    kv_heads: int
    width: int  # of the MLP: `intermediate_size`


def family(config: Any) -> str:
    """The stock model type, of a per-layer configuration too."""
    return str(config.model_type.removeprefix(PREFIX))


def head_size(config: Any) -> int:
    """Of all layers. Raises ValueError: a per-layer configuration does not say it."""
    size = getattr(config, "head_dim", None)
    if size is not None:
        return int(size)
    if config.model_type.startswith(PREFIX):
        raise ValueError("config.json: head_dim is missing, and the layers' heads do not tell it")
    return int(config.hidden_size // config.num_attention_heads)


def read_layers(config: Any) -> list[LayerSizes]:
    """The layers' sizes, first layer first. Raises ValueError for what may not differ between layers."""
    strange = set(config.per_layer_attributes or ()) - PER_LAYER
    if strange:
        raise ValueError(
            f"config.json: per_layer_config sets {', '.join(sorted(strange))}; only {', '.join(sorted(PER_LAYER))} "
            "and skip may differ between layers"
        )
    layers = []
    for index in range(config.num_hidden_layers):
        layer = config.per_layer_config[index]
        skipped = getattr(layer, "skip", [])
        attends = "attention" not in skipped
        layers.append(
            LayerSizes(
                query_heads=layer.num_attention_heads if attends else 0,
                kv_heads=layer.num_key_value_heads if attends else 0,
                width=0 if "mlp" in skipped else layer.intermediate_size,
            )
        )
    return layers


def check_parallel(layers: list[LayerSizes], size: int) -> None:
    """Raises ValueError, naming every layer and value at fault, unless each layer splits over `size` ranks.

    Query heads and widths must divide. KV heads must too, or where there are fewer than ranks, the ranks must divide
    by them: each is then held by several.
    """
    faults = []
    for index, layer in enumerate(layers):
        if layer.query_heads % size:
            faults.append(f"layer {index} num_attention_heads={layer.query_heads}")
        if layer.kv_heads and layer.kv_heads % size and size % layer.kv_heads:
            faults.append(f"layer {index} num_key_value_heads={layer.kv_heads}")
        if layer.width % size:
            faults.append(f"layer {index} intermediate_size={layer.width}")
    if faults:
        raise ValueError(
            f"tensor_parallel_size={size} does not divide {'; '.join(faults)}. Serve with a smaller "
            f"--tensor-parallel-size, or prune again for this one ([target] tensor_parallel = {size})"
        )


def expected_tensors(config: Any) -> Expected:
    """What the checkpoint of a model must hold: what transformers' own model does, each layer at its own sizes."""
    if not config.model_type.startswith(PREFIX):
        return _expected(config)
    head_size(config)  # or it would be derived from a layer's heads
    read_layers(config)
    shapes: Shapes = {}
    tied: Mapping[str, str] = {}
    for index in range(config.num_hidden_layers):
        layer = config.per_layer_config[index]
        skipped = tuple(f"{name}." for block in getattr(layer, "skip", []) for name in SKIPPED[block])
        found = _one_layer(layer)
        tied = found.tied
        for name, shape in found.shapes.items():
            inside = name.removeprefix(_LAYER)
            if inside == name:
                shapes[name] = shape
            elif not inside.startswith(skipped):
                shapes[f"model.layers.{index}.{inside}"] = shape
    return Expected(shapes, tied)


def biases(layer: Any) -> Biases:
    """Which projections of a layer with this configuration have biases."""
    names = _one_layer(layer).shapes
    return Biases(*(f"{_LAYER}{name}_proj.bias" in names for name in ("self_attn.q", "self_attn.o", "mlp.up")))


def _one_layer(layer: Any) -> Expected:
    config = copy.copy(layer)
    config.num_hidden_layers = 1
    return _expected(config)


def _expected(config: Any) -> Expected:
    """Those of the stock model of the configuration's family."""
    with torch.device("meta"):
        model = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[family(config)]](config)
    shapes = {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, model.state_dict()).items()}
    return Expected(shapes, dict(model.all_tied_weights_keys))
