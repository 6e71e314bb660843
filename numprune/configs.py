"""Configurations of pruned models.

Uniform sizes give a stock architecture if its configuration, or that of a family that stands in for it, can represent
the remaining heads. Everything else uses the family's per-layer configuration, with Hugging Face's `per_layer_config`.
Importing this module registers these with `AutoConfig`; modeling.py has their models. torch is not needed.
"""

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_IMAGE_MODELING_MAPPING_NAMES,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from numprune.anatomy import MAXIMUM_LAYERS, PER_LAYER_PREFIX, family_of
from numprune.blocks import Anatomy
from numprune.families import FAMILIES, Family
from numprune.families.family import TaskName
from numprune.hidden import EPSILON
from numprune.llamagen.config import LlamaGenConfig  # importing it registers the class
from numprune.renumber import renumber_fields
from numprune.stages import places, ratio_of, read_stages, stock_sizes

KINDS = ("attention", "mlp")
_CLASSES: Mapping[TaskName, Mapping[str, Any]] = {
    "causal-lm": {
        **MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        **MODEL_FOR_CAUSAL_IMAGE_MODELING_MAPPING_NAMES,
        LlamaGenConfig.model_type: "LlamaGenForCausalLM",
    },
    "masked-lm": MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "classification": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "embedding": MODEL_MAPPING_NAMES,
    "image-classification": MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
}
NOT_CARRIED = {"architectures", "model_type", "per_layer_config", "transformers_version", "_name_or_path"}
NOT_CARRIED |= {"stage_names", "out_features", "out_indices"}  # of backbones: made from the number of layers
CLASS_PREFIX = "Numprune"


class _PerLayerConfig:
    """Replaces the stock checks that relate heads to the hidden size, which do not apply to pruned layers."""

    family: ClassVar[Family]

    def __post_init__(self: Any, **kwargs: Any) -> None:
        family = self.family
        if family.stages is not None:  # stock classes call the number of stages num_hidden_layers
            self.num_hidden_layers = sum(stage.depth for stage in read_stages(family.stages, self))
            first = next(places(family.stages, self))
            kwargs = {**stock_sizes(family, family.stages, self, first), **kwargs}
        super().__post_init__(**kwargs)  # type: ignore[misc]

    def validate_rope(self: Any) -> None:
        PreTrainedConfig.validate_rope(self)

    def validate_architecture(self: Any) -> None:
        family = self.family
        if self.num_hidden_layers > MAXIMUM_LAYERS:
            raise ValueError(f"{self.num_hidden_layers} layers; no model has more than {MAXIMUM_LAYERS} layers")
        attending = 0
        for index in range(self.num_hidden_layers):
            layer = self.per_layer_config[index]
            skipped = getattr(layer, "skip", [])
            attending += "attention" not in skipped
            if not set(skipped) <= set(KINDS):
                raise ValueError(f"layer {index}: skip={skipped}; known are {', '.join(KINDS)}")
            heads = getattr(layer, family.heads)
            kv_heads = getattr(layer, family.kv_heads) if family.kv_heads else heads
            if heads % kv_heads:
                raise ValueError(
                    f"layer {index}: {family.heads}={heads} is not a multiple of {family.kv_heads}={kv_heads}"
                )
        if attending == 0:
            raise ValueError("every layer skips its attention; at least one must have it")
        if attending < self.num_hidden_layers and len(set(getattr(self, "layer_types", None) or ())) > 1:
            # The KV cache takes each layer's kind from `layer_types`, by its index among the layers with attention.
            raise ValueError("layers that skip attention are not supported with different layer_types")


def class_name(config: PreTrainedConfig, task: TaskName) -> str:
    """Return the name of the class of the models with this configuration for a task."""
    found: str | tuple[str, ...] = _CLASSES[task][family_of(config).name]
    stock = found[0] if isinstance(found, tuple) else found  # the first of several
    return CLASS_PREFIX + stock if config.model_type.startswith(PER_LAYER_PREFIX) else stock


def pruned_config(
    config: PreTrainedConfig, anatomy: Anatomy, *, with_bias: bool = False, dropped: Collection[int] = ()
) -> PreTrainedConfig:
    """Return a configuration for `anatomy`: stock if possible, otherwise per-layer.

    Args:
        config: of the model before pruning.
        anatomy: after pruning. If its hidden size is another, norms get the epsilon of hidden.py.
        with_bias: the consumers have new biases that the configuration does not declare yet.
        dropped: layers of `config` that `anatomy` does not have.
    """
    result = _sized_config(config, anatomy, with_bias, dropped)
    result.architectures = [class_name(result, anatomy.task)]
    return result


def _sized_config(
    config: PreTrainedConfig, anatomy: Anatomy, with_bias: bool, dropped: Collection[int]
) -> PreTrainedConfig:
    family = FAMILIES[anatomy.family]
    fields = {key: value for key, value in config.to_dict().items() if key not in NOT_CARRIED}
    if dropped:
        count = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
        fields |= {count: anatomy.layers, **renumber_fields(family, fields, dropped)}
    if anatomy.hidden_size != config.hidden_size:
        epsilon = fields[EPSILON] * config.hidden_size / anatomy.hidden_size
        fields |= {"hidden_size": anatomy.hidden_size, EPSILON: epsilon}
        fields["tie_word_embeddings"] = anatomy.is_tied
    if with_bias:
        wirings = filter(None, (family.attention, family.mlp))
        fields |= {wiring.reader.bias: True for wiring in wirings if isinstance(wiring.reader.bias, str)}
    sizes = [_layer_sizes(anatomy, layer) for layer in range(anatomy.layers)]
    if family.stages is not None and anatomy.is_uniform and _has_all_heads(anatomy):
        own = (family.heads, family.width, "head_dim", "num_hidden_layers")  # of the per-layer configuration alone
        fields = {key: value for key, value in fields.items() if key not in own}
        fields[family.stages.ratio] = ratio_of(anatomy.of_kind("mlp")[0].units, family.stages, config)
        return AutoConfig.for_model(family.name, **fields)
    per_layer = PER_LAYER_PREFIX + family.name
    # The global sizes are the first layer's; for a block that it skips, those of the first layer that has it.
    fields |= {key: value for layer in reversed(sizes) for key, value in layer.items() if key != "skip"}
    if not anatomy.is_uniform or family.stages is not None:
        fields |= {"head_dim": anatomy.head_dim}
        return AutoConfig.for_model(per_layer, **fields, per_layer_config=dict(enumerate(sizes)))
    scores = family.attention.scores
    if scores is not None and fields.pop(scores) != anatomy.head_dim:
        fields |= {"head_dim": anatomy.head_dim, scores: sizes[0][scores]}
        return AutoConfig.for_model(per_layer, **fields, per_layer_config={})
    if family.ratio is not None:
        gated = family.mlp_of(config) is not family.mlp
        ratio = family.ratio_of(fields[family.width], anatomy.hidden_size, gated=gated)
        if ratio is None:
            fields |= {"head_dim": anatomy.head_dim}
            return AutoConfig.for_model(per_layer, **fields, per_layer_config={})
        del fields[family.width]
        fields[family.ratio] = ratio
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


def _has_all_heads(anatomy: Anatomy) -> bool:
    return all(anatomy.stock_holds(block, block.size) for block in anatomy.of_kind("attention"))


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
            sizes[family.heads] = block.heads(block.size)
            if family.attention.scores:
                sizes[family.attention.scores] = block.members
            if family.kv_heads:
                sizes[family.kv_heads] = block.units
    skipped = [block.kind for block in blocks if not block.units]
    return sizes | {"skip": skipped} if skipped else sizes


def _register(family: Family) -> None:
    stock = CONFIG_MAPPING[family.name]
    # `@strict` binds the checks of the class it decorates, so each subclass needs it again.
    config: Any = strict(
        type(
            CLASS_PREFIX + stock.__name__,
            (_PerLayerConfig, stock),
            {
                "model_type": PER_LAYER_PREFIX + family.name,
                "family": family,
                "__module__": __name__,
                # Those of a stock class in stages are of stages, not of layers.
                **({"attribute_map": {}} if family.stages is not None else {}),
            },
        )
    )
    globals()[config.__name__] = config  # where pickle looks for the class
    AutoConfig.register(config.model_type, config)


for _family in FAMILIES.values():
    _register(_family)
