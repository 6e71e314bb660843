"""numprune's per-layer models on vLLM's transformers backend, with vLLM's attention and linear layers."""

from collections.abc import Iterable

from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.models.transformers import TransformersForCausalLM
from vllm.model_executor.models.transformers.base import VLLM_ATTN_ATTR
from vllm.model_executor.models.transformers.fusers import AttentionFuser
from vllm.model_executor.models.utils import PPMissingLayer, maybe_prefix

from numprune.anatomy import read_blocks
from numprune.blocks import Block
from numprune_vllm.preflight import Preflight
from numprune_vllm.sizes import expected_tensors
from numprune_vllm.weights import checked


class PerLayerBackend(TransformersForCausalLM):
    """For every family: `AutoModel` finds our class, and vLLM replaces its modules."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        Preflight.verify_and_update_config(vllm_config)  # again, so that it does not depend on the caller
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    def _create_hf_to_vllm_mapper(self) -> None:
        """Map every tensor: GPT-2's ignore pattern "attn.bias" also matches real biases."""
        self.model._keys_to_ignore_on_load_unexpected = None
        super()._create_hf_to_vllm_mapper()

    def recursive_replace(self) -> None:
        """vLLM addresses an attention module by its layer's index, ours by its index in transformers' KV cache."""
        for block, path in self._attentions():
            if block.units:
                self.get_submodule(path).layer_idx = block.layer
        super().recursive_replace()

    def _create_attention_instances(self, prefix: str = "") -> None:
        """Create attention for every layer, as vLLM requires; that of skipped blocks is removed again."""
        skipped = {block.layer: path for block, path in self._attentions() if not block.units}
        for index, path in skipped.items():
            self.attention_fusers[index] = (path, AttentionFuser(source_cls="numprune"))
        super()._create_attention_instances(prefix)
        for path in skipped.values():
            forget_attention(self.vllm_config, maybe_prefix(prefix, path))
            delattr(self.get_submodule(path), VLLM_ATTN_ATTR)

    def _attentions(self) -> Iterable[tuple[Block, str]]:
        """Return the attention blocks on this pipeline stage with the paths of their modules."""
        path = f"model.{self.model.layers_path}"
        layers = self.get_submodule(path)
        for block in read_blocks(self.config):
            if block.kind == "attention" and not isinstance(layers[block.layer], PPMissingLayer):
                yield block, f"{path}.{block.layer}.{block.modules[0]}"

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load all tensors of a checkpoint; part of one is refused as the rest would be missing."""
        return super().load_weights(checked(weights, expected_tensors(self.config)))


def forget_attention(vllm_config: VllmConfig, name: str) -> None:
    """Drop the attention modules below the module `name` from those that get a KV cache."""
    cached = vllm_config.compilation_config.static_forward_context
    for below in [key for key in cached if key.startswith(f"{name}.")]:
        del cached[below]
