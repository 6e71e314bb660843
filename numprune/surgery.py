"""Cuts the units out: slices the matrices and writes the configuration so that loaders read the result.

Uniform shapes give a stock architecture. Where transformers refuses a Llama because its heads no longer divide the
hidden size, the same network is written as Mistral, which has no such check (sliding window off). Layers that differ
give the family's per-layer class (modeling.py).
"""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from numprune.anatomy import PER_LAYER_PREFIX, Anatomy, Block
from numprune.modeling import SKIPPED  # importing it registers the per-layer classes

_NOT_CARRIED = {"architectures", "model_type", "per_layer_config", "transformers_version", "_name_or_path"}
_LLAMA_ONLY = {"attention_bias", "mlp_bias", "pretraining_tp"}


def channels_of(block: Block, units: Tensor) -> Tensor:
    """Return the consumer's channel indices of `units` (ascending), (len(units) * channels_per_unit,)."""
    return _expand(units, block.channels_per_unit)


def rows_of(block: Block, units: Tensor, producer: tuple[str, int]) -> Tensor:
    """Return the row indices of `units` (ascending) in one of the block's producers."""
    return _expand(units, producer[1])


def pruned_config(config: PreTrainedConfig, anatomy: Anatomy, *, with_bias: bool = False) -> PreTrainedConfig:
    """Return the configuration that holds `anatomy`: stock where one can, else per-layer.

    Args:
        config: of the model before pruning.
        anatomy: after pruning.
        with_bias: the consumers got biases that the configuration does not yet declare.
    """
    fields = {key: value for key, value in config.to_dict().items() if key not in _NOT_CARRIED}
    if with_bias:
        fields |= {"attention_bias": True, "mlp_bias": True}
    sizes = [_layer_sizes(anatomy, layer) for layer in range(anatomy.layers)]
    # The first layer's sizes stand for the model; where it skips a block, those of the first that has it.
    fields |= {key: value for layer in reversed(sizes) for key, value in layer.items() if key != "skip"}
    fields |= {"head_dim": anatomy.head_dim}
    if not anatomy.is_uniform:
        return AutoConfig.for_model(
            PER_LAYER_PREFIX + anatomy.family, **fields, per_layer_config=dict(enumerate(sizes))
        )
    family = anatomy.family
    if family == "llama" and anatomy.hidden_size % fields["num_attention_heads"]:
        if fields["attention_bias"] or fields["mlp_bias"]:  # Mistral has no biases
            return AutoConfig.for_model("numprune_llama", **fields, per_layer_config={})
        family = "mistral"
        fields = {key: value for key, value in fields.items() if key not in _LLAMA_ONLY} | {"sliding_window": None}
    return AutoConfig.for_model(family, **fields)


def cut_layer(
    layer: nn.Module, blocks: Iterable[Block], kept: Mapping[str, Tensor], biases: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return what is left of a decoder layer's tensors by full name; those that are not cut are shared with `layer`.

    Args:
        layer: its consumer weights already compensated.
        blocks: its two blocks.
        kept: block name -> (K,) units to keep; none: the block goes, its norm too.
        biases: block name -> (out,) consumer biases for blocks that had none (FLAP's compensation); may be empty.
    """
    state = dict(layer.state_dict())
    index = {block.layer for block in blocks}.pop()
    for block in blocks:
        if not len(kept[block.name]):
            gone = tuple(f"{module}." for module in SKIPPED[block.kind])
            state = {name: tensor for name, tensor in state.items() if not name.startswith(gone)}
            continue
        consumer = f"{block.consumer}.weight"
        units = kept[block.name].to(state[consumer].device)
        state[consumer] = state[consumer][:, channels_of(block, units)].contiguous()
        for producer, rows_per_unit in block.producers:
            for name in (f"{producer}.weight", f"{producer}.bias"):
                if name in state:
                    state[name] = state[name][rows_of(block, units, (producer, rows_per_unit))].contiguous()
        if block.name in biases:
            state[f"{block.consumer}.bias"] = biases[block.name].to(state[consumer].dtype)
            for producer, _ in block.producers:
                rows = state[f"{producer}.weight"]
                state.setdefault(f"{producer}.bias", rows.new_zeros(len(rows)))
    return {f"model.layers.{index}.{name}": tensor for name, tensor in state.items()}


def narrowed(layer: nn.Module, block: Block, units: Tensor) -> nn.Module:
    """Return a decoder layer whose `block` has only `units`; all parameters but that block's are those of `layer`."""
    shared = {id(parameter): parameter for parameter in layer.parameters()}
    result = copy.deepcopy(layer, shared)
    for name, tensor in cut_layer(layer, (block,), {block.name: units}, {}).items():
        module, _, parameter = name.removeprefix(f"model.layers.{block.layer}.").rpartition(".")
        if module == block.consumer or module in dict(block.producers):
            linear: Any = result.get_submodule(module)
            setattr(linear, parameter, nn.Parameter(tensor.clone()))
            linear.out_features, linear.in_features = linear.weight.shape
    return result


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """Return the model that `config` describes, in evaluation mode, on the meta device: shapes without values."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


def assemble(model: PreTrainedModel, config: PreTrainedConfig, layers: Mapping[str, Tensor]) -> PreTrainedModel:
    """Return a new model of `config` with the tensors `layers` in its decoder layers, and `model`'s own around them."""
    result = skeleton(config)
    around = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("model.layers.")}
    result.load_state_dict(around | dict(layers), strict=True, assign=True)
    result.tie_weights()
    # Rotary frequencies are not in the state; built on the meta device they have no values.
    result.model.rotary_emb = type(result.model.rotary_emb)(config=result.config).to(model.device)
    result.generation_config = model.generation_config
    return result


def _layer_sizes(anatomy: Anatomy, layer: int) -> dict[str, Any]:
    """The layer's entry of `per_layer_config`."""
    attention, mlp = anatomy.of_layer(layer)
    sizes: dict[str, Any] = {}
    if attention.units:
        sizes["num_attention_heads"] = attention.units * anatomy.query_heads_per_group
        sizes["num_key_value_heads"] = attention.units
    if mlp.units:
        sizes["intermediate_size"] = mlp.units
    skipped = [block.kind for block in (attention, mlp) if not block.units]
    return sizes | {"skip": skipped} if skipped else sizes


def _expand(units: Tensor, size: int) -> Tensor:
    return (units[:, None] * size + torch.arange(size, device=units.device)).flatten()
