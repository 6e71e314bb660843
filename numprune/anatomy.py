"""Where a model's prunable units are: blocks, units, channels, and the stored tensors that share them.

Everything is read from the configuration, so a model can be planned for before its weights are loaded. What an
architecture looks like stands in `families`; every other one is refused by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from numprune.errors import InputError
from numprune.families import FAMILIES, Family, Kind, Matrix
from numprune.families.family import LINEAR_PARTS, Part, Wiring

# A model whose layers differ keeps its family under a model type of ours (see modeling.py).
PER_LAYER_PREFIX = "numprune_"
MAXIMUM_LAYERS = 10_000  # an untrusted configuration may say anything, and every layer is looked at
HOW_TO_ADD = "docs/adding-an-architecture.md"


@dataclass(frozen=True)
class Slice:
    """Where the units of a block lie in one stored tensor.

    Attributes:
        tensor: its name in the layer.
        dim: the dimension that the units divide.
        parts: how many entries of `dim` a unit owns in each part of the tensor.
        width: the size of the other dimension; None: there is no other.
        interleaved: a unit has all its parts, then comes the next; otherwise all units' first parts come first.
    """

    tensor: str
    dim: int
    parts: tuple[int, ...]
    width: int | None
    interleaved: bool = False

    @property
    def size(self) -> int:
        """Entries of `dim` that a unit owns."""
        return sum(self.parts)

    @property
    def parameters_per_unit(self) -> int:
        return self.size * (1 if self.width is None else self.width)

    def shape(self, units: int) -> tuple[int, ...]:
        """Return the shape of the tensor of a block with so many units."""
        if self.width is None:
            return (units * self.size,)
        return (units * self.size, self.width) if self.dim == 0 else (self.width, units * self.size)

    def entries(self, units: Tensor, total: int, part: int | None = None) -> Tensor:
        """Return the indices along `dim`, ascending, of `units` (ascending) out of `total`, in one part or in all."""
        wanted = range(len(self.parts)) if part is None else (part,)
        found = []
        for index in wanted:
            offset = sum(self.parts[:index])
            stride, start = (self.size, offset) if self.interleaved else (self.parts[index], offset * total)
            inside = torch.arange(self.parts[index], device=units.device)
            found.append((start + units[:, None] * stride + inside).flatten())
        return torch.cat(found).sort().values


@dataclass(frozen=True)
class Block:
    """One prunable block of one layer.

    A unit of attention is a KV group (one KV head and the query heads that share it; a single head where there is no
    grouping), a unit of an MLP is one intermediate channel. A block of no units is skipped: its modules are not there.

    Attributes:
        path: of its layer in the model.
        units: how many it has.
        consumer: the module in the layer that reads the units; its output is the block's.
        reader: the units' place in the consumer's weight.
        writers: their place in the matrices, and in their biases, that write them.
        linear: the weight among `writers`, and its part, that the block's output is linear in, the rest given; or None.
        shared: name -> shape of the tensors that go only with the whole block: norms, the consumer's bias.
        modules: that silence the block when they put out zeros.
        separable: units can go without changing what the others compute.
        norm_behind: a norm stands between the consumer and the residual stream.
        sizes: attribute of the layer's modules -> what it counts for each unit, where tensors do not tell all.
    """

    layer: int
    kind: Kind
    path: str
    units: int
    consumer: str
    reader: Slice
    writers: tuple[Slice, ...]
    linear: tuple[Slice, int] | None
    shared: Mapping[str, tuple[int, ...]]
    modules: tuple[str, ...]
    separable: bool
    norm_behind: bool
    sizes: Mapping[str, int]

    @property
    def name(self) -> str:
        return f"layers.{self.layer}.{self.kind}"

    @property
    def slices(self) -> tuple[Slice, ...]:
        return (self.reader, *self.writers)

    @property
    def channels_per_unit(self) -> int:
        return self.reader.size

    @property
    def channels(self) -> int:
        """Of the consumer's input. Unit `u` owns channels_per_unit of them, from `u * channels_per_unit` on."""
        return self.units * self.channels_per_unit

    @property
    def consumer_bias(self) -> bool:
        return f"{self.consumer}.bias" in self.shared

    @property
    def parameters_per_unit(self) -> int:
        return sum(part.parameters_per_unit for part in self.slices)

    @property
    def shared_parameters(self) -> int:
        return sum(prod(shape) for shape in self.shared.values())

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Return name and shape of all tensors of the block, by their names in the layer."""
        if not self.units:
            return {}
        return {part.tensor: part.shape(self.units) for part in self.slices} | dict(self.shared)


@dataclass(frozen=True)
class Anatomy:
    """A decoder-only transformer as its blocks and what surrounds them."""

    family: str
    hidden_size: int
    head_dim: int
    query_heads_per_group: int
    vocabulary: int
    blocks: tuple[Block, ...]  # attention before MLP, first layer first: the order of the forward pass
    around: Mapping[str, tuple[int, ...]]  # name -> shape of the tensors that no block owns, tied ones once
    output_parameters: int  # of the matrix that gives the logits, tied or not
    bytes_per_value: int  # of the dtype that the configuration names
    sliding_window: int | None
    attention_differs: bool  # some layers look at a window, others at everything
    parallel: bool  # both blocks of a layer read what enters it
    residual_scale: float  # by which a block's output is multiplied on its way into the residual stream

    @property
    def layers(self) -> int:
        return self.blocks[-1].layer + 1

    @property
    def fixed_parameters(self) -> int:
        """Embeddings and the last norm."""
        return sum(prod(shape) for shape in self.around.values())

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

    def stock_holds(self, block: Block, units: int) -> bool:
        """Whether a configuration that is not ours can hold a model whose blocks of that kind have so many units."""
        family = FAMILIES[self.family]
        heads = units * self.query_heads_per_group
        if block.kind == "mlp" or family.stock_heads == "any" or family.stand_in is not None:
            return True
        if family.stock_heads == "divisors":
            return self.hidden_size % heads == 0
        return heads * self.head_dim == self.hidden_size


def family_of(config: PreTrainedConfig) -> Family:
    """Return the family of a configuration.

    Raises:
        InputError: the architecture is not supported; names it, the supported ones, and how to add one.
    """
    name = config.model_type.removeprefix(PER_LAYER_PREFIX)
    if name not in FAMILIES:
        raise InputError(
            f"architecture {config.model_type!r} ({', '.join(config.architectures or ['no class named'])}) is not "
            f"supported; supported are {', '.join(FAMILIES)}; {HOW_TO_ADD} shows how to add one"
        )
    if getattr(config, "quantization_config", None):
        raise InputError("the model is quantized; prune the unquantized checkpoint and quantize the result")
    family = FAMILIES[name]
    equal = {field: (getattr(config, other),) for field, other in family.equal.items()}
    for field, values in (family.requires | equal).items():
        attribute, _, key = field.partition(".")
        found = getattr(config, attribute)
        found = found.get(key) if key else found
        if found not in values:
            raise InputError(f"{field}={found!r}: {name} is supported only with {' or '.join(map(repr, values))}")
    return family


def read_anatomy(config: PreTrainedConfig) -> Anatomy:
    """Return the anatomy of a (possibly already pruned, possibly per-layer) model from its configuration.

    Raises:
        InputError: as `read_blocks`, or layers differ in the query heads of a KV head or in the head size.
    """
    family = family_of(config)
    blocks = read_blocks(config)
    hidden, vocabulary = config.hidden_size, config.vocab_size
    sizes = (_layer_sizes(family, config.per_layer_config[layer], layer) for layer in range(config.num_hidden_layers))
    groups = {(heads // kv_heads, head_dim) for heads, kv_heads, head_dim, _ in sizes}
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
        blocks=blocks,
        around=_around(family, config),
        output_parameters=vocabulary * hidden,
        bytes_per_value=dtype.itemsize if dtype is not None else 4,
        sliding_window=getattr(config, "sliding_window", None),
        attention_differs=len(set(getattr(config, "layer_types", None) or ())) > 1,
        parallel=family.flag(family.parallel, config),
        residual_scale=float(getattr(config, family.residual_scale)) if family.residual_scale else 1.0,
    )


def read_blocks(config: PreTrainedConfig) -> tuple[Block, ...]:
    """Return the blocks of a model, attention before MLP, first layer first; each layer's units may be of its own kind.

    Raises:
        InputError: the architecture is not supported, or its sizes contradict each other.
    """
    family = family_of(config)
    _require_sizes(config, "hidden_size", "vocab_size", "num_hidden_layers")
    if config.num_hidden_layers > MAXIMUM_LAYERS:
        raise InputError(f"num_hidden_layers={config.num_hidden_layers}; no model has more than {MAXIMUM_LAYERS}")
    blocks: list[Block] = []
    for layer in range(config.num_hidden_layers):
        sizes = config.per_layer_config[layer]
        heads, kv_heads, head_dim, width = _layer_sizes(family, sizes, layer)
        skipped = getattr(sizes, "skip", [])
        entries: dict[Part, int] = {"query": heads // kv_heads * head_dim, "key": head_dim, "value": head_dim}
        entries |= {"gate": 1, "up": 1, "inner": 1}
        counts: dict[Kind, int] = {"attention": kv_heads, "mlp": width}
        for kind, units in counts.items():
            wiring = family.wiring(kind)
            blocks.append(_block(family, wiring, config, layer, kind, 0 if kind in skipped else units, entries))
    return tuple(blocks)


def _layer_sizes(family: Family, sizes: Any, layer: int) -> tuple[int, int, int, int]:
    """Return query heads, KV heads, channels of a head and the MLP's width of one layer's configuration."""
    where, hidden = f"layer {layer}: ", sizes.hidden_size
    _require_sizes(sizes, family.heads, where=where)
    _require_sizes(sizes, family.width, where=where, optional=family.default_width is not None)
    _require_sizes(sizes, *filter(None, (family.kv_heads, "head_dim")), where=where, optional=True)
    heads = getattr(sizes, family.heads)
    kv_heads = (getattr(sizes, family.kv_heads) if family.kv_heads else None) or heads
    if heads % kv_heads:
        raise InputError(f"{where}{family.heads}={heads} is no multiple of {family.kv_heads}={kv_heads}")
    head_dim = getattr(sizes, "head_dim", None) or hidden // heads
    width = getattr(sizes, family.width)
    if width is None and family.default_width is not None:
        width = family.default_width * hidden
    return heads, kv_heads, head_dim, width


def _block(
    family: Family, wiring: Wiring, config: Any, layer: int, kind: Kind, units: int, entries: Mapping[Part, int]
) -> Block:
    hidden = config.hidden_size

    def weight(matrix: Matrix, dim: int) -> Slice:
        parts = tuple(entries[part] for part in matrix.parts)
        return Slice(f"{matrix.path}.weight", dim, parts, hidden, family.interleaved)

    counted = {"groups": 1, "heads": entries["query"] // entries["key"], "channels": entries["query"]}
    writers, linear = [], None
    for matrix in wiring.writers:
        place = weight(matrix, 1 if family.transposed else 0)
        writers.append(place)
        if family.flag(matrix.bias, config):
            writers.append(replace(place, tensor=f"{matrix.path}.bias", dim=0, width=None))
        for index, part in enumerate(matrix.parts):
            if part in LINEAR_PARTS:
                linear = (place, index)
    shared: dict[str, tuple[int, ...]] = {}
    for norm in wiring.norms:
        shared |= _norm(family, norm, hidden)
    shared |= {f"{norm}.weight": (entries["key"],) for norm in wiring.head_norms}
    for norm, size in zip(wiring.joint_norms, (entries["query"], entries["key"]), strict=False):
        shared[f"{norm}.weight"] = (size * units,)
    if family.flag(wiring.reader.bias, config):
        shared[f"{wiring.reader.path}.bias"] = (hidden,)
    return Block(
        layer=layer,
        kind=kind,
        path=f"{family.layers}.{layer}",
        units=units,
        consumer=wiring.reader.path,
        reader=weight(wiring.reader, 0 if family.transposed else 1),
        writers=tuple(writers),
        linear=linear,
        shared=shared,
        modules=wiring.modules,
        separable=not wiring.joint_norms,
        norm_behind=wiring.norm_behind,
        sizes={attribute: counted[what] for attribute, what in wiring.sizes.items()},
    )


def _norm(family: Family, path: str, size: int) -> dict[str, tuple[int, ...]]:
    return {f"{path}.{name}": (size,) for name in (("weight", "bias") if family.norm_bias else ("weight",))}


def _around(family: Family, config: Any) -> dict[str, tuple[int, ...]]:
    hidden = config.hidden_size
    table = (config.vocab_size, hidden)
    around: dict[str, tuple[int, ...]] = {f"{family.embedding}.weight": table}
    if family.positions:
        path, extra = family.positions
        around[f"{path}.weight"] = (config.max_position_embeddings + extra, hidden)
    around |= _norm(family, family.final_norm, hidden)
    if not config.tie_word_embeddings:
        around[f"{family.head}.weight"] = table
    return around


def _require_sizes(config: Any, *names: str, where: str = "", optional: bool = False) -> None:
    """Raises InputError unless each of these is a whole number above zero, or may be and is not there."""
    for name in names:
        value = getattr(config, name, None)
        if value is None and optional:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
            raise InputError(f"{where}{name}={str(value)[:80]}; it must be a whole number above zero")
