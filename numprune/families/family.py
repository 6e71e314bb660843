"""The vocabulary in which an architecture is written down: a `Family` of `Matrix`es, read by anatomy.py.

Paths are those of modules in transformers' modeling code: of a layer's modules inside the layer, of all others inside
the model. Fields that are strings name fields of the configuration.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["attention", "mlp"]
Part = Literal["query", "key", "value", "gate", "up", "inner"]
Counted = Literal["groups", "heads", "heads per group", "channels"]
Flag = bool | str  # a string: the configuration's field of that name says

# The parts of a block's writers that its output is linear in, everything else given.
LINEAR_PARTS: frozenset[Part] = frozenset({"value", "up"})


@dataclass(frozen=True)
class Matrix:
    """A projection of a block.

    Attributes:
        path: of its module in the layer.
        parts: what of a unit stands in it: of a KV group its `query` heads, its `key` and its `value` head; of an MLP's
            channel its `gate` and its `up` projection, or, without a gate, its `inner` value.
        bias: whether it has one.
    """

    path: str
    parts: tuple[Part, ...]
    bias: Flag = False


@dataclass(frozen=True)
class Wiring:
    """One block of a layer: what writes its units, what reads them, and how it stands in the residual stream.

    Attributes:
        writers: the projections whose outputs are the units.
        reader: the projection that reads them; its output is the block's.
        modules: of the block; while all of them put out zeros, the layer is the other block alone.
        norms: modules that go with the block.
        head_norms: norms over a head's queries or keys, which all heads share.
        joint_norms: norms over the queries or the keys of all heads together: no head can go without changing the rest.
        norm_behind: a norm stands between the reader and the residual stream.
        sizes: attributes by which the layer knows how large the block is, besides its matrices -> what they count.
    """

    writers: tuple[Matrix, ...]
    reader: Matrix
    modules: tuple[str, ...]
    norms: tuple[str, ...]
    head_norms: tuple[str, ...] = ()
    joint_norms: tuple[str, ...] = ()
    norm_behind: bool = False
    sizes: Mapping[str, Counted] = field(default_factory=dict)


@dataclass(frozen=True)
class StandIn:
    """Another family that computes the same and holds head counts that this one's configuration refuses.

    Attributes:
        name: of that family.
        unless: fields that must not be true.
        dropped: fields that it does not have, besides those.
        fields: that it needs.
    """

    name: str
    unless: tuple[str, ...]
    dropped: tuple[str, ...]
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class Vllm:
    """How vLLM runs the family's stock checkpoints.

    Attributes:
        native: by a class of its own; otherwise by its transformers backend.
        takes_head_dim: that class reads `head_dim`; otherwise fewer heads need the transformers backend.
        per_layer: the plug-in numprune-vllm runs it where layers differ.
    """

    native: bool = True
    takes_head_dim: bool = True
    per_layer: bool = False


@dataclass(frozen=True)
class Family:
    """A decoder-only architecture of transformers.

    Attributes:
        name: its `model_type`.
        attention, mlp: the blocks of a layer, in the order in which they write to the residual stream.
        layers, embedding, final_norm, head: paths in the model.
        positions: path of learned positions and how many they are beyond the context, or None.
        heads, kv_heads, width: the configuration's fields for a layer's sizes; no `kv_heads`: no grouping.
        default_width: the MLP's width in hidden sizes where `width` is not set, or None: it must be.
        norm_bias: norms have a bias.
        transposed: matrices are stored (in, out).
        interleaved: in a matrix with several parts a unit has all its parts, then comes the next unit; otherwise all
            units' first parts come first.
        parallel: both blocks read what enters the layer.
        residual_scale: the field of the factor by which a block's output is multiplied, or None.
        stock_heads: what the stock configuration holds: `any` number of heads of the same size, `divisors` of the
            hidden size, or `all` that the hidden size has room for.
        stand_in: holds the rest, or None.
        requires: field, or "field.key", -> the values that this description is right for.
        equal: field -> another that must have the same value.
        attention_implementation: of transformers.
        computed: ends of the names of tensors that older versions of transformers stored and newer ones compute.
        vllm: how it is served.
    """

    name: str
    attention: Wiring
    mlp: Wiring
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    positions: tuple[str, int] | None = None
    heads: str = "num_attention_heads"
    kv_heads: str | None = "num_key_value_heads"
    width: str = "intermediate_size"
    default_width: int | None = None
    norm_bias: bool = False
    transposed: bool = False
    interleaved: bool = False
    parallel: Flag = False
    residual_scale: str | None = None
    stock_heads: Literal["any", "divisors", "all"] = "any"
    stand_in: StandIn | None = None
    requires: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    equal: Mapping[str, str] = field(default_factory=dict)
    attention_implementation: str = "sdpa"
    computed: tuple[str, ...] = ("rotary_emb.inv_freq",)
    vllm: Vllm = field(default_factory=Vllm)

    def wiring(self, kind: Kind) -> Wiring:
        return self.attention if kind == "attention" else self.mlp

    def flag(self, flag: Flag, config: Any) -> bool:
        """Return what the family or the configuration says."""
        return flag if isinstance(flag, bool) else bool(getattr(config, flag))


def attention(
    *,
    bias: Flag = False,
    reader_bias: Flag = False,
    norms: tuple[str, ...] = ("input_layernorm",),
    module: str = "self_attn",
    reader: str = "o_proj",
    sizes: Mapping[str, Counted] | None = None,
    **wiring: Any,
) -> Wiring:
    """Return attention with a projection each for queries, keys and values, by the names that most decoders use."""
    parts: tuple[tuple[str, Part], ...] = (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"))
    return Wiring(
        writers=tuple(Matrix(f"{module}.{name}", (part,), bias) for name, part in parts),
        reader=Matrix(f"{module}.{reader}", ("query",), reader_bias),
        modules=(module,),
        norms=norms,
        sizes={f"{module}.num_key_value_groups": "heads per group"} if sizes is None else sizes,
        **wiring,
    )


def gated_mlp(
    *, bias: Flag = False, norms: tuple[str, ...] = ("post_attention_layernorm",), norm_behind: bool = False
) -> Wiring:
    """Return an MLP whose inner values are act(gate) * up, by the names that most decoders use."""
    return Wiring(
        writers=(Matrix("mlp.gate_proj", ("gate",), bias), Matrix("mlp.up_proj", ("up",), bias)),
        reader=Matrix("mlp.down_proj", ("up",), bias),
        modules=("mlp",),
        norms=norms,
        norm_behind=norm_behind,
    )


def plain_mlp(writer: str, reader: str, *, bias: Flag, norms: tuple[str, ...], modules: tuple[str, ...]) -> Wiring:
    """Return an MLP without a gate."""
    return Wiring(
        writers=(Matrix(writer, ("inner",), bias),),
        reader=Matrix(reader, ("inner",), bias),
        modules=modules,
        norms=norms,
    )
