"""Remove units: slice the tensors, and create a configuration with which loaders read the result.

Uniform sizes give a stock architecture if its configuration, or that of a family that stands in for it, can represent
the remaining heads. Everything else uses the family's per-layer class (modeling.py).
"""

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from numprune.anatomy import PER_LAYER_PREFIX, family_of, layers_path, task_name
from numprune.blocks import Anatomy, Block
from numprune.families import FAMILIES
from numprune.modeling import AUTO_OF, class_of, resize  # importing it registers the per-layer classes
from numprune.renumber import renumber_fields
from numprune.slices import Kept

_NOT_CARRIED = {"architectures", "model_type", "per_layer_config", "transformers_version", "_name_or_path"}


def channels_of(block: Block, kept: Kept) -> Tensor:
    """Return the kept channels of the consumer, ascending: (K * M * channels of a member,) indices."""
    return block.reader.entries(kept, block.size)


def can_hold_bias(family: str) -> bool:
    """Return whether the consumers of the family have biases, or can have by its configuration."""
    entry = FAMILIES[family]
    return entry.experts is None and all(
        wiring is not None and wiring.reader.bias is not False for wiring in (entry.attention, entry.mlp)
    )


def pruned_config(
    config: PreTrainedConfig, anatomy: Anatomy, *, with_bias: bool = False, dropped: Collection[int] = ()
) -> PreTrainedConfig:
    """Return a configuration for `anatomy`: stock if possible, otherwise per-layer.

    Args:
        config: of the model before pruning.
        anatomy: after pruning.
        with_bias: the consumers have new biases that the configuration does not declare yet.
        dropped: layers of `config` that `anatomy` does not have.
    """
    result = _sized_config(config, anatomy, with_bias, dropped)
    result.architectures = [class_of(result, anatomy.task).__name__]
    return result


def _sized_config(
    config: PreTrainedConfig, anatomy: Anatomy, with_bias: bool, dropped: Collection[int]
) -> PreTrainedConfig:
    family = FAMILIES[anatomy.family]
    fields = {key: value for key, value in config.to_dict().items() if key not in _NOT_CARRIED}
    if dropped:
        count = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
        fields |= {count: anatomy.layers, **renumber_fields(family, fields, dropped)}
    if with_bias:
        wirings = filter(None, (family.attention, family.mlp))
        fields |= {wiring.reader.bias: True for wiring in wirings if isinstance(wiring.reader.bias, str)}
    sizes = [_layer_sizes(anatomy, layer) for layer in range(anatomy.layers)]
    # The global sizes are the first layer's; for a block that it skips, those of the first layer that has it.
    fields |= {key: value for layer in reversed(sizes) for key, value in layer.items() if key != "skip"}
    per_layer = PER_LAYER_PREFIX + family.name
    if not anatomy.is_uniform:
        fields |= {"head_dim": anatomy.head_dim}
        return AutoConfig.for_model(per_layer, **fields, per_layer_config=dict(enumerate(sizes)))
    heads = fields[family.heads]
    if family.stock_heads == "all" and heads * anatomy.head_dim == anatomy.hidden_size:
        return AutoConfig.for_model(family.name, **fields)
    fields |= {"head_dim": anatomy.head_dim}
    if family.stock_heads == "any" or (family.stock_heads == "divisors" and anatomy.hidden_size % heads == 0):
        return AutoConfig.for_model(family.name, **fields)
    other = family.stand_in
    if other is None or any(fields[flag] for flag in other.unless):
        return AutoConfig.for_model(per_layer, **fields, per_layer_config={})
    fields = {key: value for key, value in fields.items() if key not in (*other.unless, *other.dropped, *other.fields)}
    return AutoConfig.for_model(other.name, **fields, **other.fields)


def cut_layer(
    layer: nn.Module, blocks: Iterable[Block], kept: Mapping[str, Kept], biases: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the remaining tensors of a decoder layer by full name; uncut ones are shared with `layer`.

    Args:
        layer: with consumer weights already compensated.
        blocks: all of its blocks.
        kept: by block name; without units, the block is removed with its norms.
        biases: block name -> (out,) consumer biases for blocks that had none (FLAP's compensation); may be empty.
    """
    state = dict(layer.state_dict())
    (path,) = {block.path for block in blocks}
    for block in blocks:
        if not kept[block.name].size.units:
            for name in (*(part.tensor for part in block.slices), *block.shared):
                state.pop(name, None)  # missing if the block was removed earlier
            continue
        state |= _cut(state, block, kept[block.name])
        if block.name in biases:
            state[f"{block.consumer}.bias"] = biases[block.name].to(state[block.reader.tensor].dtype)
            for writer in block.writers:
                if writer.width is not None:
                    weight = state[writer.tensor]
                    zeros = weight.new_zeros(weight.shape[writer.dim])
                    state.setdefault(writer.tensor.removesuffix("weight") + "bias", zeros)
    return {f"{path}.{name}": tensor for name, tensor in state.items()}


def narrowed(layer: nn.Module, block: Block, kept: Kept) -> nn.Module:
    """Return a decoder layer whose `block` has only `kept`; it shares all other parameters with `layer`."""
    shared = {id(parameter): parameter for parameter in layer.parameters()}
    result = copy.deepcopy(layer, shared)
    cut = {name: value.clone() for name, value in _cut(layer.state_dict(), block, kept).items()}
    resize(result, block.resized(kept.size), cut)
    return result


def _cut(state: Mapping[str, Tensor], block: Block, kept: Kept) -> dict[str, Tensor]:
    """Return the kept parts of the block's tensors, by name in the layer."""
    return {part.tensor: part.cut(state[part.tensor], kept, block.size) for part in block.slices}


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """Return the model that `config` describes, in evaluation mode, its parameters on the meta device.

    Parameters have shapes but no values; buffers, which are computed and not stored, have values.
    """
    implementation = family_of(config).attention_implementation
    with _parameters_without_values():
        auto = AUTO_OF[task_name(config)]
        return auto.from_config(config, attn_implementation=implementation).eval()


@contextmanager
def _parameters_without_values() -> Iterator[None]:
    """Create every parameter on the meta device."""
    register = nn.Module.register_parameter

    def register_empty(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(module, name, None if param is None else nn.Parameter(param.to("meta"), param.requires_grad))

    nn.Module.register_parameter = register_empty  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def assemble(model: PreTrainedModel, config: PreTrainedConfig, layers: Mapping[str, Tensor]) -> PreTrainedModel:
    """Return a new model of `config` with the tensors `layers` in its decoder layers and the rest from `model`."""
    result = skeleton(config)
    inside = f"{layers_path(config)}."
    around = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(inside)}
    result.load_state_dict(around | dict(layers), strict=True, assign=True)
    result.tie_weights()
    result.to(model.device)
    if model.can_generate():
        result.generation_config = model.generation_config
    return result


def _layer_sizes(anatomy: Anatomy, layer: int) -> dict[str, Any]:
    """The layer's entry of `per_layer_config`."""
    family = FAMILIES[anatomy.family]
    blocks = anatomy.of_layer(layer)
    sizes: dict[str, Any] = {}
    for block in blocks:
        if not block.units:
            continue
        if block.kind == "mlp":
            sizes[block.field] = block.units
        elif family.experts is not None and block.kind == "experts":
            sizes |= {family.experts.count: block.units, family.experts.width: block.members}
        else:
            sizes[family.heads] = block.units * block.members
            if family.kv_heads:
                sizes[family.kv_heads] = block.units
    skipped = [block.kind for block in blocks if not block.units]
    return sizes | {"skip": skipped} if skipped else sizes
