"""Where a model's prunable units are: blocks, units, channels, and the matrices that share them.

Everything is read from the configuration, so a model can be planned for before its weights are loaded. Supported
architectures stand in `FAMILIES`; every other one is refused by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from transformers import PreTrainedConfig

from numprune.errors import InputError

Kind = Literal["attention", "mlp"]


@dataclass(frozen=True)
class Family:
    """What sets an architecture apart from plain Llama, as far as its prunable matrices go."""

    name: str
    qkv_bias: bool | None  # None: the configuration's `attention_bias` says
    qk_norm: bool  # RMS norms over the head dimension of queries and keys, shared by all heads
    mlp_bias: bool | None = False  # None: the configuration's `mlp_bias` says


FAMILIES: dict[str, Family] = {
    "llama": Family("llama", qkv_bias=None, qk_norm=False, mlp_bias=None),
    "mistral": Family("mistral", qkv_bias=False, qk_norm=False),
    "qwen2": Family("qwen2", qkv_bias=True, qk_norm=False),
    "qwen3": Family("qwen3", qkv_bias=None, qk_norm=True),
}
# A model whose layers differ keeps its family under a model type of ours (see modeling.py).
PER_LAYER_PREFIX = "numprune_"
MAXIMUM_LAYERS = 10_000  # a configuration from a stranger may say anything, and every layer is looked at


@dataclass(frozen=True)
class Block:
    """One prunable block of one decoder layer.

    A unit of attention is a KV group (one KV head and the query heads that share it; a single head where there is no
    grouping), a unit of an MLP is one intermediate channel. Unit `u` owns the channels
    `u * channels_per_unit … (u + 1) * channels_per_unit` of the consumer's input, and in each producer the rows
    `u * rows … (u + 1) * rows`. A block of no units is skipped: its modules are not there.
    """

    layer: int
    kind: Kind
    units: int
    channels_per_unit: int
    consumer: str  # module path inside the decoder layer
    producers: tuple[tuple[str, int], ...]  # (module path, rows per unit)
    parameters_per_unit: int
    shared_parameters: int  # its norms and the consumer's bias: what goes only with the whole block
    consumer_bias: bool

    @property
    def name(self) -> str:
        return f"layers.{self.layer}.{self.kind}"

    @property
    def channels(self) -> int:
        return self.units * self.channels_per_unit


@dataclass(frozen=True)
class Anatomy:
    """A decoder-only transformer as its blocks and what surrounds them."""

    family: str
    hidden_size: int
    head_dim: int
    query_heads_per_group: int
    vocabulary: int
    blocks: tuple[Block, ...]  # attention before MLP, first layer first: the order of the forward pass
    fixed_parameters: int  # embeddings and the last norm: what no block owns
    output_parameters: int  # of the matrix that gives the logits, tied or not
    bytes_per_value: int  # of the dtype that the configuration names
    sliding_window: int | None
    attention_differs: bool  # some layers look at a window, others at everything

    @property
    def layers(self) -> int:
        return self.blocks[-1].layer + 1

    @property
    def is_uniform(self) -> bool:
        """Every layer has the same number of units of each kind, so a stock architecture can hold it."""
        units = [{block.units for block in self.of_kind(kind)} for kind in ("attention", "mlp")]
        return all(len(counts) == 1 and 0 not in counts for counts in units)

    def of_kind(self, kind: str) -> tuple[Block, ...]:
        return tuple(block for block in self.blocks if block.kind == kind)

    def of_layer(self, index: int) -> tuple[Block, ...]:
        """Its attention and its MLP."""
        return self.blocks[2 * index : 2 * index + 2]

    def keeping(self, units: Mapping[str, int]) -> "Anatomy":
        """Return the anatomy with `units[block.name]` units left in each block."""
        return replace(self, blocks=tuple(replace(block, units=units[block.name]) for block in self.blocks))


def family_of(config: PreTrainedConfig) -> Family:
    """Return the family of a configuration.

    Raises:
        InputError: the architecture is not supported; names it and the supported ones.
    """
    name = config.model_type.removeprefix(PER_LAYER_PREFIX)
    if name not in FAMILIES:
        raise InputError(
            f"architecture {config.model_type!r} ({', '.join(config.architectures or ['no class named'])}) is not "
            f"supported; supported are {', '.join(FAMILIES)}"
        )
    if getattr(config, "quantization_config", None):
        raise InputError("the model is quantized; prune the unquantized checkpoint and quantize the result")
    return FAMILIES[name]


def read_anatomy(config: PreTrainedConfig) -> Anatomy:
    """Return the anatomy of a (possibly already pruned, possibly per-layer) model from its configuration.

    Raises:
        InputError: the architecture is not supported, or its sizes contradict each other.
    """
    family = family_of(config)
    _require_sizes(config, "hidden_size", "vocab_size", "num_hidden_layers")
    if config.num_hidden_layers > MAXIMUM_LAYERS:
        raise InputError(f"num_hidden_layers={config.num_hidden_layers}; no model has more than {MAXIMUM_LAYERS}")
    hidden, vocabulary = config.hidden_size, config.vocab_size
    blocks: list[Block] = []
    fixed = vocabulary * hidden * (1 if config.tie_word_embeddings else 2) + hidden
    groups = set()
    for layer in range(config.num_hidden_layers):
        sizes = config.per_layer_config[layer]
        skipped = getattr(sizes, "skip", [])
        _require_sizes(sizes, "num_attention_heads", "intermediate_size", where=f"layer {layer}: ")
        _require_sizes(sizes, "num_key_value_heads", "head_dim", where=f"layer {layer}: ", optional=True)
        heads = sizes.num_attention_heads
        kv_heads = sizes.num_key_value_heads or heads
        head_dim = getattr(sizes, "head_dim", None) or hidden // heads
        if heads % kv_heads:
            raise InputError(
                f"layer {layer}: num_attention_heads={heads} is no multiple of num_key_value_heads={kv_heads}"
            )
        group = heads // kv_heads
        groups.add((group, head_dim))
        attention_bias = _flag(family.qkv_bias, config, "attention_bias")
        output_bias = family.qkv_bias is None and attention_bias  # Qwen2 has biases on q, k, v only
        mlp_bias = _flag(family.mlp_bias, config, "mlp_bias")
        blocks.append(
            Block(
                layer=layer,
                kind="attention",
                units=0 if "attention" in skipped else kv_heads,
                channels_per_unit=group * head_dim,
                consumer="self_attn.o_proj",
                producers=(
                    ("self_attn.q_proj", group * head_dim),
                    ("self_attn.k_proj", head_dim),
                    ("self_attn.v_proj", head_dim),
                ),
                parameters_per_unit=(2 * group + 2) * hidden * head_dim + attention_bias * (group + 2) * head_dim,
                shared_parameters=hidden + family.qk_norm * 2 * head_dim + output_bias * hidden,
                consumer_bias=output_bias,
            )
        )
        blocks.append(
            Block(
                layer=layer,
                kind="mlp",
                units=0 if "mlp" in skipped else sizes.intermediate_size,
                channels_per_unit=1,
                consumer="mlp.down_proj",
                producers=(("mlp.gate_proj", 1), ("mlp.up_proj", 1)),
                parameters_per_unit=3 * hidden + 2 * mlp_bias,
                shared_parameters=hidden + mlp_bias * hidden,
                consumer_bias=mlp_bias,
            )
        )
    if len(groups) != 1:
        raise InputError(
            f"layers differ in query heads per KV head or in head_dim ({sorted(groups)}); that is not supported"
        )
    group, head_dim = groups.pop()
    dtype = config.dtype
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise InputError(f"dtype={str(dtype)[:80]}; it must be the name of a data type of torch")
    return Anatomy(
        family=family.name,
        hidden_size=hidden,
        head_dim=head_dim,
        query_heads_per_group=group,
        vocabulary=vocabulary,
        blocks=tuple(blocks),
        fixed_parameters=fixed,
        output_parameters=vocabulary * hidden,
        bytes_per_value=dtype.itemsize if dtype is not None else 4,
        sliding_window=getattr(config, "sliding_window", None),
        attention_differs=len(set(getattr(config, "layer_types", None) or ())) > 1,
    )


def _require_sizes(config: Any, *names: str, where: str = "", optional: bool = False) -> None:
    """Raises InputError unless each of these is a whole number above zero, or may be and is not there."""
    for name in names:
        value = getattr(config, name, None)
        if value is None and optional:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
            raise InputError(f"{where}{name}={str(value)[:80]}; it must be a whole number above zero")


def _flag(fixed: bool | None, config: Any, name: str) -> bool:
    return bool(getattr(config, name, False)) if fixed is None else fixed
