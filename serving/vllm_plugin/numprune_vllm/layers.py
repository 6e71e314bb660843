"""A decoder layer at sizes of its own, put together from vLLM's attention, MLP and norm layers.

Tensors are [tokens, hidden]: vLLM runs the tokens of all requests as one sequence.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm.model_executor.models.llama import LlamaAttention, LlamaMLP
from vllm.model_executor.models.qwen3 import Qwen3Attention
from vllm.model_executor.models.utils import extract_layer_index

from numprune_vllm.sizes import Biases, biases, head_size

# (the layer's own configuration, its biases, vLLM's configuration, prefix of the module's name)
MakeAttention = Callable[[Any, Biases, VllmConfig, str], nn.Module]


def llama_attention(config: Any, bias: Biases, vllm_config: VllmConfig, prefix: str) -> nn.Module:
    """Attention of Llama and Mistral, and of Qwen2: Llama's with biases where Qwen2 has them and a free head size."""
    return LlamaAttention(
        config=config,
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        max_position_embeddings=config.max_position_embeddings,
        quant_config=vllm_config.quant_config,
        bias=bias.qkv,
        bias_o_proj=bias.output,
        cache_config=vllm_config.cache_config,
        prefix=prefix,
    )


def qwen3_attention(config: Any, bias: Biases, vllm_config: VllmConfig, prefix: str) -> nn.Module:
    """Attention with norms over each head's queries and keys."""
    head_dim = head_size(config)
    slides = config.layer_types[extract_layer_index(prefix)] == "sliding_attention"
    attention = Qwen3Attention(
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        rope_parameters=config.rope_parameters,
        max_position=config.max_position_embeddings,
        head_dim=head_dim,
        rms_norm_eps=config.rms_norm_eps,
        qkv_bias=bias.qkv,
        cache_config=vllm_config.cache_config,
        quant_config=vllm_config.quant_config,
        prefix=prefix,
        per_layer_sliding_window=config.sliding_window if slides else None,
    )
    if bias.output:  # transformers' Qwen3 has it under attention_bias, vLLM's never
        attention.o_proj = RowParallelLinear(
            config.num_attention_heads * head_dim,
            config.hidden_size,
            bias=True,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.o_proj",
        )
    return attention


class DecoderLayer(nn.Module):
    """Attention and MLP behind a norm each; what the layer's configuration skips is not there, its norm included."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str, make_attention: MakeAttention) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config.per_layer_config[extract_layer_index(prefix)]
        skipped = getattr(config, "skip", [])
        bias = biases(config)
        self.attends, self.has_mlp = "attention" not in skipped, "mlp" not in skipped
        if self.attends:
            self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.self_attn = make_attention(config, bias, vllm_config, f"{prefix}.self_attn")
        if self.has_mlp:
            self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.mlp = LlamaMLP(
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                hidden_act=config.hidden_act,
                quant_config=vllm_config.quant_config,
                bias=bias.mlp,
                prefix=f"{prefix}.mlp",
            )

    def forward(self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return what the last block computed and the residual stream without it, as vLLM's Llama hands them on."""
        if self.attends:
            hidden_states, residual = _add_and_norm(self.input_layernorm, hidden_states, residual)
            hidden_states = self.self_attn(positions=positions, hidden_states=hidden_states)
        if self.has_mlp:
            hidden_states, residual = _add_and_norm(self.post_attention_layernorm, hidden_states, residual)
            hidden_states = self.mlp(hidden_states)
        if residual is None:  # the first layer, and it skips both
            return torch.zeros_like(hidden_states), hidden_states
        return hidden_states, residual


def _add_and_norm(norm: RMSNorm, hidden_states: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    if residual is None:  # the embedding itself
        return norm(hidden_states), hidden_states
    return norm(hidden_states, residual)
