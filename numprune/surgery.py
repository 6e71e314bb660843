"""Remove units: slice the tensors, and assemble models of what remains."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from numprune.anatomy import family_of, read_anatomy, task_name
from numprune.blocks import Block
from numprune.errors import InputError, reason
from numprune.families import FAMILIES
from numprune.hidden import Narrowing, narrow_block
from numprune.modeling import AUTO_OF, resize  # importing it registers the per-layer classes
from numprune.placement import connect, is_spread
from numprune.slices import Kept

NOT_BUILT = "config.json: transformers cannot build a model from it"


def channels_of(block: Block, kept: Kept) -> Tensor:
    """Return the kept channels of the consumer, ascending: (K * M * channels of a member,) indices."""
    return block.reader.entries(kept, block.size)


def can_hold_bias(family: str) -> bool:
    """Return whether the consumers of the family have biases, or can have by its configuration."""
    entry = FAMILIES[family]
    return entry.experts is None and all(
        wiring is not None and wiring.reader.bias is not False for wiring in (entry.attention, entry.mlp)
    )


def cut_layer(
    layer: nn.Module,
    blocks: Iterable[Block],
    kept: Mapping[str, Kept],
    biases: Mapping[str, Tensor],
    coordinates: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return the remaining tensors of a decoder layer by full name; uncut ones are shared with `layer`.

    Args:
        layer: with consumer weights already compensated.
        blocks: all of its blocks.
        kept: by block name; without units, the block is removed with its norms.
        biases: block name -> (out,) consumer biases for blocks that had none (FLAP's compensation); may be empty.
        coordinates: of the residual stream that are kept, (K,); None: all.
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
                if writer.hidden_dim is not None:
                    weight = state[writer.tensor]
                    zeros = weight.new_zeros(weight.shape[writer.dim])
                    state.setdefault(writer.tensor.removesuffix("weight") + "bias", zeros)
        if coordinates is not None:
            state |= narrow_block(state, block, coordinates)
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

    Raises:
        InputError: the configuration says something that transformers does not know.
    """
    implementation, auto = family_of(config).attention_implementation, AUTO_OF[task_name(config)]
    try:
        with _parameters_without_values():
            return auto.from_config(config, attn_implementation=implementation).eval()
    except Exception as error:  # a malformed file can make transformers raise anything
        raise InputError(f"{NOT_BUILT}: {reason(error)}") from error


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


def assemble(
    model: PreTrainedModel,
    config: PreTrainedConfig,
    layers: Mapping[str, Tensor],
    narrowing: Narrowing | None = None,
) -> PreTrainedModel:
    """Return a new model of `config` with the tensors `layers` in its decoder layers and the rest from `model`.

    `narrowing`: of the rest, too; None: the hidden size stays.
    """
    result = skeleton(config)
    anatomy = read_anatomy(model.config)
    around = {name: tensor for name, tensor in model.state_dict().items() if not anatomy.is_in_layers(name)}
    if narrowing is not None:
        gain = around[anatomy.final_gain]
        around = {name: narrowing.around(name, tensor, gain, anatomy) for name, tensor in around.items()}
    result.load_state_dict(around | dict(layers), strict=True, assign=True)
    result.tie_weights()
    if is_spread(result):
        connect(result)
    else:
        result.to(model.device)
    if model.can_generate():
        result.generation_config = model.generation_config
    return result
