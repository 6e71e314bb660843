"""The configurations of per-layer models, word for word those of `numprune.modeling`, which a test compares.

This distribution stands alone: neither numprune nor, for this module, vLLM is needed.
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

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


ARCHITECTURES: dict[str, type[PreTrainedConfig]] = {
    "NumpruneLlamaForCausalLM": NumpruneLlamaConfig,
    "NumpruneMistralForCausalLM": NumpruneMistralConfig,
    "NumpruneQwen2ForCausalLM": NumpruneQwen2Config,
    "NumpruneQwen3ForCausalLM": NumpruneQwen3Config,
}
