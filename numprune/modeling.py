"""Decoders whose layers differ in heads and intermediate size: classes that heed Hugging Face's `per_layer_config`.

transformers reads and writes `per_layer_config` but its modeling code builds every layer from the global sizes. Each
class here is its family's stock class with layers built from their own configuration. Importing this module registers
them with `AutoConfig` and `AutoModelForCausalLM`; nothing is loaded from a checkpoint but data.
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from torch import nn
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


class _PerLayerConfig:
    """Replaces the stock check that heads divide the hidden size, which pruned layers need not obey."""

    def validate_architecture(self: Any) -> None:
        for index in range(self.num_hidden_layers):
            layer = self.per_layer_config[index]
            if layer.num_attention_heads % layer.num_key_value_heads:
                raise ValueError(
                    f"layer {index}: num_attention_heads={layer.num_attention_heads} is no multiple of "
                    f"num_key_value_heads={layer.num_key_value_heads}"
                )


class _PerLayerModel:
    """Builds each decoder layer from `config.per_layer_config[i]`."""

    def __init__(self: Any, config: PreTrainedConfig) -> None:
        # The stock constructor reads the global sizes, which do not exist here: give it the first layer's.
        super().__init__(config.per_layer_config[0])  # type: ignore[call-arg]
        config._attn_implementation_internal = self.config._attn_implementation_internal
        self.config = self.model.config = config
        layer_class = type(self.model.layers[0])
        self.model.layers = nn.ModuleList(
            [layer_class(config.per_layer_config[index], index) for index in range(config.num_hidden_layers)]
        )

    def set_attn_implementation(self: Any, *args: Any, **kwargs: Any) -> None:
        super().set_attn_implementation(*args, **kwargs)  # type: ignore[misc]
        for layer in self.model.layers:  # each layer holds a copy of the configuration
            layer.self_attn.config._attn_implementation_internal = self.config._attn_implementation_internal


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
