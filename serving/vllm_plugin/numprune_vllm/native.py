"""vLLM's own models with each layer built from its own configuration.

A layer's modules have the same names in vLLM as in transformers, except for fused projections. So the family's
description determines which modules to silence if a layer lacks a block.
"""

import copy
import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import LinearBase, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding
from vllm.model_executor.models.registry import ModelRegistry
from vllm.model_executor.models.utils import PPMissingLayer, maybe_prefix
from vllm.model_executor.offloader import NoopOffloader, get_offloader

from numprune.anatomy import read_blocks
from numprune.blocks import Block, by_layer
from numprune.families import Family
from numprune_vllm.backend import PerLayerBackend, forget_attention
from numprune_vllm.preflight import Preflight
from numprune_vllm.sizes import expected_tensors
from numprune_vllm.weights import checked


class _PerLayer:
    """Mixed into vLLM's class of a family."""

    family: Family

    def __new__(cls, *, vllm_config: VllmConfig, prefix: str = "") -> Any:
        """Return a model of the transformers backend if vLLM's own class ignores settings in config.json."""
        if cls.family.vllm.refused(vllm_config.model_config.hf_config):
            return PerLayerBackend(vllm_config=vllm_config, prefix=prefix)
        return super().__new__(cls)

    def __init__(self: Any, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        Preflight.verify_and_update_config(vllm_config)  # again, so that it does not depend on the caller
        if not isinstance(get_offloader(), NoopOffloader):
            raise ValueError("vLLM cannot offload weights of models whose layers differ; serve without offloading")
        config = vllm_config.model_config.hf_config
        layers = [_layer_config(self.family, config, index) for index in range(config.num_hidden_layers)]
        # The stock constructor makes all layers alike. They are replaced one by one, so they are created small.
        with _configured(vllm_config, min(layers, key=lambda layer: getattr(layer, self.family.width))):
            super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.config = config
        made = self.get_submodule(self.family.layers)
        for index, (sizes, blocks) in enumerate(zip(layers, by_layer(read_blocks(config)), strict=True)):
            if isinstance(made[index], PPMissingLayer):
                continue
            name = maybe_prefix(prefix, f"{self.family.layers}.{index}")
            layer = made[index] = _layer(type(made[index]), sizes, vllm_config, name)
            for block in blocks:
                if not block.units:
                    _skip(layer, block, vllm_config, name)
                elif block.kind == "attention" and self.family.stock_heads == "all":
                    _set_heads(layer.get_submodule(block.modules[0]), block, vllm_config, f"{name}.{block.modules[0]}")

    def load_weights(self: Any, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load all tensors of a checkpoint; part of one is refused as the rest would be missing."""
        return super().load_weights(checked(weights, expected_tensors(self.config)))  # type: ignore[misc]


class _Silent(nn.Module):
    """Stands in for attention, an MLP or one of its projections that the layer lacks."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._with_bias = isinstance(
            module, LinearBase
        )  # vLLM's linear layers also return a bias that they did not add

    def forward(self, hidden_states: Tensor, positions: Tensor | None = None) -> Tensor | tuple[Tensor, None]:
        zeros = torch.zeros_like(hidden_states)
        return (zeros, None) if self._with_bias else zeros


class _NoNorm(nn.Module):
    """Stands in for the norm of a missing block; vLLM's norms also add to the residual stream."""

    def forward(self, hidden_states: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        return hidden_states if residual is None else (hidden_states, hidden_states + residual)


def native_class(name: str, family: Family) -> type[nn.Module]:
    """Return the class `name` of the family's per-layer models, derived from vLLM's own."""
    model_type, _ = family.vllm.layers_as or (family.name, {})
    stock = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[model_type]].__name__
    native = ModelRegistry.models[stock].load_model_cls()
    return type(name, (_PerLayer, native), {"family": family, "__module__": __name__})


def _layer_config(family: Family, config: PreTrainedConfig, index: int) -> PreTrainedConfig:
    """Return the configuration for vLLM's layer class, perhaps with more heads than it has (see `_set_heads`)."""
    sizes = copy.copy(config.per_layer_config[index])
    _, fields = family.vllm.layers_as or (family.name, {})
    for field, value in fields.items():
        setattr(sizes, field, value)
    if family.stock_heads == "all":
        for field in filter(None, (family.heads, family.kv_heads)):
            setattr(sizes, field, sizes.hidden_size // sizes.head_dim)
    return sizes


@contextmanager
def _configured(vllm_config: VllmConfig, config: PreTrainedConfig) -> Iterator[None]:
    """Make `config` the model's within the context."""
    model_config = vllm_config.model_config
    whole, model_config.hf_config = model_config.hf_config, config
    try:
        yield
    finally:
        model_config.hf_config = whole


def _layer(stock: type[nn.Module], sizes: PreTrainedConfig, vllm_config: VllmConfig, name: str) -> nn.Module:
    """Return a layer built from its own configuration, replacing the one that vLLM built under that name."""
    forget_attention(vllm_config, name)
    known = {
        "config": sizes,
        "vllm_config": vllm_config,
        "cache_config": vllm_config.cache_config,
        "quant_config": vllm_config.quant_config,
        "prefix": name,
    }
    wanted = inspect.signature(stock).parameters
    with _configured(vllm_config, sizes):
        return stock(**{key: value for key, value in known.items() if key in wanted})


def _skip(layer: nn.Module, block: Block, vllm_config: VllmConfig, name: str) -> None:
    below = tuple(f"{path}." for path in block.modules)
    norms = {tensor.rpartition(".")[0] for tensor in block.shared if not tensor.startswith(below)}
    for path in block.modules:
        forget_attention(vllm_config, f"{name}.{path}")
        layer.set_submodule(path, _Silent(layer.get_submodule(path)))
    for path in norms:
        layer.set_submodule(path, _NoNorm())


def _set_heads(attention: nn.Module, block: Block, vllm_config: VllmConfig, name: str) -> None:
    """Set the block's number of heads; the class derived it from the hidden size."""
    forget_attention(vllm_config, name)
    heads, ranks = block.units * block.members, vllm_config.parallel_config.tensor_parallel_size
    made: Any
    for child, module in attention.named_children():
        common: dict[str, Any] = {"quant_config": vllm_config.quant_config, "prefix": f"{name}.{child}"}
        if isinstance(module, QKVParallelLinear):
            sizes = (module.hidden_size, module.head_size, heads, block.units)
            made = QKVParallelLinear(*sizes, bias=module.bias is not None, **common)
            # some classes split its output by these
            attention.q_size, attention.kv_size = made.num_heads * made.head_size, made.num_kv_heads * made.head_size
        elif isinstance(module, RowParallelLinear):
            made = RowParallelLinear(block.channels, module.output_size, bias=module.bias is not None, **common)
        elif isinstance(module, Attention):
            common |= {"num_kv_heads": max(1, block.units // ranks), "cache_config": vllm_config.cache_config}
            made = Attention(heads // ranks, module.head_size, module.impl.scale, **common)
        elif isinstance(module, RotaryEmbedding):
            continue  # depends only on the head size
        else:
            raise TypeError(f"{name}.{child}: {type(module).__name__} cannot be given another number of heads")
        setattr(attention, child, made)
