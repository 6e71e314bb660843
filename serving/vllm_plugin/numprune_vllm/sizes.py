"""What a configuration says of each layer's sizes, of every stored tensor's shape, and of how it can be split.

Neither vLLM nor numprune is needed. Shapes are those of the checkpoint: [out, in] for a matrix.
"""

from dataclasses import dataclass
from typing import Any

PREFIX = "numprune_"  # of the model types whose layers differ
PER_LAYER = {"num_attention_heads", "num_key_value_heads", "intermediate_size"}


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


def biases(config: Any) -> Biases:
    """Which projections have biases, as transformers' modeling code of the family decides it."""
    match family(config):
        case "llama":
            return Biases(config.attention_bias, config.attention_bias, config.mlp_bias)
        case "mistral":
            return Biases(False, False, False)
        case "qwen2":
            return Biases(True, False, False)
        case "qwen3":
            return Biases(config.attention_bias, config.attention_bias, False)
    raise ValueError(f"model type {config.model_type!r}: known are llama, mistral, qwen2 and qwen3, also per layer")


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


def tensor_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that the checkpoint must have; `lm_head.weight` too, also where it is tied."""
    hidden, head_dim, bias = config.hidden_size, head_size(config), biases(config)
    embedding = (config.vocab_size, hidden)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": embedding,
        "model.norm.weight": (hidden,),
        "lm_head.weight": embedding,
    }

    def linear(name: str, outputs: int, inputs: int, has_bias: bool) -> None:
        shapes[f"{name}.weight"] = (outputs, inputs)
        if has_bias:
            shapes[f"{name}.bias"] = (outputs,)

    for index, layer in enumerate(read_layers(config)):
        prefix = f"model.layers.{index}."
        if layer.query_heads:
            shapes[f"{prefix}input_layernorm.weight"] = (hidden,)
            for name, heads in (("q", layer.query_heads), ("k", layer.kv_heads), ("v", layer.kv_heads)):
                linear(f"{prefix}self_attn.{name}_proj", heads * head_dim, hidden, bias.qkv)
            linear(f"{prefix}self_attn.o_proj", hidden, layer.query_heads * head_dim, bias.output)
            if family(config) == "qwen3":
                shapes[f"{prefix}self_attn.q_norm.weight"] = shapes[f"{prefix}self_attn.k_norm.weight"] = (head_dim,)
        if layer.width:
            shapes[f"{prefix}post_attention_layernorm.weight"] = (hidden,)
            linear(f"{prefix}mlp.gate_proj", layer.width, hidden, bias.mlp)
            linear(f"{prefix}mlp.up_proj", layer.width, hidden, bias.mlp)
            linear(f"{prefix}mlp.down_proj", hidden, layer.width, bias.mlp)
    return shapes
