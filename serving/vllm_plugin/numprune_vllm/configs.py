"""The configurations of per-layer models, made of transformers' own for the stock families.

This distribution stands alone: neither numprune nor, for this module, vLLM is needed.
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from numprune_vllm.sizes import PREFIX, SKIPPED

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # whose layers `layers.DecoderLayer` is


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


def _config(family: str) -> type[PreTrainedConfig]:
    stock = CONFIG_MAPPING[family]
    # `@strict` binds the checks of the class it decorates, so each subclass needs it again for its own to count.
    fields = {"model_type": PREFIX + family, "__module__": __name__}
    return strict(type(f"Numprune{stock.__name__}", (_PerLayerConfig, stock), fields))


_CONFIGS = [_config(family) for family in FAMILIES]
# pickle, by which vLLM's workers get their configuration, finds a class by its name in its module.
globals().update({config.__name__: config for config in _CONFIGS})
ARCHITECTURES: dict[str, type[PreTrainedConfig]] = {
    f"{config.__name__.removesuffix('Config')}ForCausalLM": config for config in _CONFIGS
}
