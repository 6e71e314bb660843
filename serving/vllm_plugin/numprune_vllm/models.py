"""The four families as vLLM models: its Llama around layers of their own sizes. vLLM imports this, never `register`."""

from collections.abc import Iterable
from functools import partial

from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.utils import AutoWeightsLoader

from numprune_vllm.layers import DecoderLayer, MakeAttention, llama_attention, qwen3_attention
from numprune_vllm.sizes import check_parallel, read_layers, tensor_shapes
from numprune_vllm.weights import checked


class NumpruneLlamaForCausalLM(LlamaForCausalLM):
    """Embedding, last norm and output matrix are the same in all four families; only attention differs."""

    make_attention: MakeAttention = staticmethod(llama_attention)

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        if getattr(config, "quantization_config", None):
            raise ValueError(
                f"{config.model_type}: the checkpoint is quantized; only unquantized per-layer checkpoints can be "
                "compared with their configuration, so only those are served"
            )
        check_parallel(read_layers(config), vllm_config.parallel_config.tensor_parallel_size)
        super().__init__(
            vllm_config=vllm_config,
            prefix=prefix,
            layer_type=partial(DecoderLayer, make_attention=self.make_attention),
        )

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load all tensors of a checkpoint; part of one is refused as the rest would be missing."""
        tied = self.config.tie_word_embeddings
        return AutoWeightsLoader(self).load_weights(checked(weights, tensor_shapes(self.config), tied=tied))


class NumpruneMistralForCausalLM(NumpruneLlamaForCausalLM):
    pass


class NumpruneQwen2ForCausalLM(NumpruneLlamaForCausalLM):
    pass


class NumpruneQwen3ForCausalLM(NumpruneLlamaForCausalLM):
    make_attention = staticmethod(qwen3_attention)
