"""Models whose layers differ: vLLM's Llama around layers of their own sizes. vLLM imports this, never `register`."""

from collections.abc import Iterable
from functools import partial

from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.utils import AutoWeightsLoader

from numprune_vllm.layers import DecoderLayer, MakeAttention, llama_attention, qwen3_attention
from numprune_vllm.preflight import Preflight
from numprune_vllm.sizes import expected_tensors
from numprune_vllm.weights import checked


class NumpruneLlamaForCausalLM(LlamaForCausalLM):
    """Embedding, last norm and output matrix are the same in all of them; only attention differs."""

    make_attention: MakeAttention = staticmethod(llama_attention)

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        Preflight.verify_and_update_config(vllm_config)  # again, so that nothing rests on who calls it
        super().__init__(
            vllm_config=vllm_config,
            prefix=prefix,
            layer_type=partial(DecoderLayer, make_attention=self.make_attention),
        )

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load all tensors of a checkpoint; part of one is refused as the rest would be missing."""
        return AutoWeightsLoader(self).load_weights(checked(weights, expected_tensors(self.config)))


class NumpruneMistralForCausalLM(NumpruneLlamaForCausalLM):
    pass


class NumpruneQwen2ForCausalLM(NumpruneLlamaForCausalLM):
    pass


class NumpruneQwen3ForCausalLM(NumpruneLlamaForCausalLM):
    make_attention = staticmethod(qwen3_attention)
