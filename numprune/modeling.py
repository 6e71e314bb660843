"""Decoders whose layers differ in heads and intermediate size: classes that heed Hugging Face's `per_layer_config`.

transformers reads and writes `per_layer_config` but its modeling code builds every layer from the global sizes. Each
class here is its family's stock class with layers built from their own configuration. A layer whose `skip` names
"attention" or "mlp" does without that block, its norm included. Importing this module registers the classes with
`AutoConfig` and `AutoModelForCausalLM`; nothing is loaded from a checkpoint but data.
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SKIPPED = {"attention": ("input_layernorm", "self_attn"), "mlp": ("post_attention_layernorm", "mlp")}


class _PerLayerConfig:
    """Replaces the stock check that heads divide the hidden size, which pruned layers need not obey."""

    def validate_architecture(self: Any) -> None:
        attending = 0
        for index in range(self.num_hidden_layers):
            layer = self.per_layer_config[index]
            skipped = getattr(layer, "skip", [])
            attending += "attention" not in skipped
            if not set(skipped) <= SKIPPED.keys():
                raise ValueError(f"layer {index}: skip={skipped}; known are {', '.join(SKIPPED)}")
            if layer.num_attention_heads % layer.num_key_value_heads:
                raise ValueError(
                    f"layer {index}: num_attention_heads={layer.num_attention_heads} is no multiple of "
                    f"num_key_value_heads={layer.num_key_value_heads}"
                )
        if attending == 0:
            raise ValueError("every layer skips its attention; at least one must have it")
        if attending < self.num_hidden_layers and len(set(getattr(self, "layer_types", None) or ())) > 1:
            # The KV cache takes each layer's kind from `layer_types`, by its place among those that attend.
            raise ValueError("layers skip their attention, while layer_types differ; that is not supported")


class _PerLayerModel:
    """Builds each decoder layer from `config.per_layer_config[i]`."""

    def __init__(self: Any, config: PreTrainedConfig) -> None:
        # The stock constructor reads the global sizes, which do not exist here: give it the first layer's.
        super().__init__(config.per_layer_config[0])  # type: ignore[call-arg]
        config._attn_implementation_internal = self.config._attn_implementation_internal
        self.config = self.model.config = config
        stock = type(self.model.layers[0])
        self.model.layers = nn.ModuleList()
        attending = 0
        for index in range(config.num_hidden_layers):
            sizes = config.per_layer_config[index]
            skips = getattr(sizes, "skip", [])
            layer: Any = _skipping(stock)(sizes, index) if skips else stock(sizes, index)
            if "attention" not in skips:
                # Its place in the KV cache, which takes the length so far from its first layer.
                layer.self_attn.layer_idx = attending
                attending += 1
            self.model.layers.append(layer)

    def set_attn_implementation(self: Any, *args: Any, **kwargs: Any) -> None:
        super().set_attn_implementation(*args, **kwargs)  # type: ignore[misc]
        for layer in self.model.layers:  # each layer holds a copy of the configuration
            if hasattr(layer, "self_attn"):
                layer.self_attn.config._attn_implementation_internal = self.config._attn_implementation_internal


def _skipping(stock: Any) -> Any:
    """The family's decoder layer for a configuration with `skip`."""

    class SkippingLayer(stock):
        def __init__(self, config: PreTrainedConfig, layer_idx: int) -> None:
            super().__init__(config, layer_idx)
            self.skip = frozenset(config.skip)
            for block in self.skip:
                for module in SKIPPED[block]:
                    delattr(self, module)

        def forward(self, hidden_states: Tensor, **attention: Any) -> Tensor:
            if "attention" not in self.skip:
                hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), **attention)[0]
            if "mlp" not in self.skip:
                hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
            return hidden_states

    return SkippingLayer


# `@strict` binds the checks of the class it decorates, so each subclass needs it again for its own to count.
@strict
class NumpruneLlamaConfig(_PerLayerConfig, LlamaConfig):
    model_type = "numprune_llama"


@strict
class NumpruneMistralConfig(_PerLayerConfig, MistralConfig):
    model_type = "numprune_mistral"


@strict
class NumpruneQwen2Config(_PerLayerConfig, Qwen2Config):
    model_type = "numprune_qwen2"


@strict
class NumpruneQwen3Config(_PerLayerConfig, Qwen3Config):
    model_type = "numprune_qwen3"


class NumpruneLlamaForCausalLM(_PerLayerModel, LlamaForCausalLM):
    config_class = NumpruneLlamaConfig


class NumpruneMistralForCausalLM(_PerLayerModel, MistralForCausalLM):
    config_class = NumpruneMistralConfig


class NumpruneQwen2ForCausalLM(_PerLayerModel, Qwen2ForCausalLM):
    config_class = NumpruneQwen2Config


class NumpruneQwen3ForCausalLM(_PerLayerModel, Qwen3ForCausalLM):
    config_class = NumpruneQwen3Config


for _config, _model in (
    (NumpruneLlamaConfig, NumpruneLlamaForCausalLM),
    (NumpruneMistralConfig, NumpruneMistralForCausalLM),
    (NumpruneQwen2Config, NumpruneQwen2ForCausalLM),
    (NumpruneQwen3Config, NumpruneQwen3ForCausalLM),
):
    AutoConfig.register(_config.model_type, _config)
    AutoModelForCausalLM.register(_config, _model)
