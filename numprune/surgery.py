"""Cuts the units out: slices the matrices and writes the configuration so that loaders read the result.

Uniform shapes give a stock architecture. Where transformers refuses a Llama because its heads no longer divide the
hidden size, the same network is written as Mistral, which has no such check (sliding window off). Layers that differ
give the family's per-layer class (modeling.py).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from numprune.anatomy import PER_LAYER_PREFIX, Anatomy, Block, read_anatomy
from numprune.errors import InputError
from numprune.modeling import SKIPPED  # importing it registers the per-layer classes
from numprune.plan import Plan

_NOT_CARRIED = {"architectures", "model_type", "per_layer_config", "transformers_version", "_name_or_path"}
_LLAMA_ONLY = {"attention_bias", "mlp_bias", "pretraining_tp"}


def channels_of(block: Block, units: Tensor) -> Tensor:
    """Return the consumer's channel indices of `units` (ascending), (len(units) * channels_per_unit,)."""
    return _expand(units, block.channels_per_unit)


def pruned_config(config: PreTrainedConfig, anatomy: Anatomy, *, with_bias: bool = False) -> PreTrainedConfig:
    """Return the configuration that holds `anatomy`: stock where one can, else per-layer.

    Args:
        config: of the model before pruning.
        anatomy: after pruning.
        with_bias: the consumers got biases that the configuration does not yet declare.

    Raises:
        InputError: `with_bias` for a family whose classes cannot hold consumer biases.
    """
    fields = {key: value for key, value in config.to_dict().items() if key not in _NOT_CARRIED}
    if with_bias:
        if anatomy.family != "llama":
            raise InputError(
                f"bias compensation needs an architecture whose projections can hold a bias; {anatomy.family} has none"
            )
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


def slice_model(model: PreTrainedModel, plan: Plan, biases: Mapping[str, Tensor] | None = None) -> PreTrainedModel:
    """Return a new model that holds only the kept units; tensors that are not cut are shared with `model`.

    Args:
        model: the model the plan was made for, its consumer weights already compensated.
        plan: the units to keep.
        biases: block name -> (out,) consumer biases for blocks that had none (FLAP's compensation).

    Raises:
        InputError: the plan does not fit the model.
    """
    anatomy = read_anatomy(model.config)
    plan.check(anatomy)
    state = dict(model.state_dict())
    for block in anatomy.blocks:
        prefix = f"model.layers.{block.layer}."
        if not plan.blocks[block.name].kept:
            gone = tuple(f"{prefix}{module}." for module in SKIPPED[block.kind])
            state = {name: tensor for name, tensor in state.items() if not name.startswith(gone)}
            continue
        kept = torch.tensor(plan.blocks[block.name].kept, device=model.device)
        consumer = prefix + block.consumer + ".weight"
        state[consumer] = state[consumer][:, channels_of(block, kept)].contiguous()
        for producer, rows_per_unit in block.producers:
            for name in (f"{prefix}{producer}.weight", f"{prefix}{producer}.bias"):
                if name in state:
                    state[name] = state[name][_expand(kept, rows_per_unit)].contiguous()
        if biases is not None:
            state[f"{prefix}{block.consumer}.bias"] = biases[block.name].to(model.dtype)
            for producer, _ in block.producers:
                rows = state[f"{prefix}{producer}.weight"]
                state.setdefault(f"{prefix}{producer}.bias", rows.new_zeros(len(rows)))
    config = pruned_config(model.config, anatomy.keeping(plan.units_kept()), with_bias=biases is not None)
    return _assemble(model, config, state)


def _assemble(model: PreTrainedModel, config: PreTrainedConfig, state: dict[str, Tensor]) -> PreTrainedModel:
    with torch.device("meta"):
        result = AutoModelForCausalLM.from_config(config, attn_implementation=model.config._attn_implementation)
    result.load_state_dict(state, strict=True, assign=True)
    result.tie_weights()
    # Rotary frequencies are not in the state; built on the meta device they have no values.
    result.model.rotary_emb = type(result.model.rotary_emb)(config=result.config).to(model.device)
    result.generation_config = model.generation_config
    return result.eval()


def _layer_sizes(anatomy: Anatomy, layer: int) -> dict[str, Any]:
    """The layer's entry of `per_layer_config`."""
    attention, mlp = (block for block in anatomy.blocks if block.layer == layer)
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
