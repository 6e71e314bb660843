"""The vocabulary in which an architecture is written down: a `Family` of `Matrix`es, read by anatomy.py.

Paths are those of modules in transformers' modeling code: of a layer's modules inside the layer, of all others inside
the model. Fields that are strings name fields of the configuration.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

TaskName = Literal["causal-lm", "masked-lm", "classification", "embedding"]
Kind = Literal["attention", "mlp", "experts"]
Part = Literal["query", "key", "value", "gate", "up", "inner"]
Counted = Literal["groups", "heads", "heads per group", "channels", "experts", "channels per expert"]
Shape = tuple[str, ...]  # fields of the configuration that are a tensor's sizes
Flag = bool | str  # a string: the configuration's field of that name says
# What a field of the configuration says of single layers: a list with an `entry` for each, the number of the `first`
# layers that something holds for, a list of the `layers` that it holds for, that a layer computes with its own `index`,
# or the `step` from one layer that it holds for to the next.
PerLayer = Literal["entry", "first", "layers", "index", "step"]

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
        modules: of the block, of attention the one that has its weights first; while all of them put out zeros (and
            the norms after it do nothing), the layer is the other block alone.
        norms: modules that go with the block.
        head_norms: norms over a head's queries or keys, which all heads share.
        joint_norms: norms over the queries or the keys of all heads together: no head can go without changing the rest.
        norm_behind: a norm, or a factor that depends on the token, stands between the reader and the residual stream.
        post_norm: `norms` come after the sum of the block's output and the stream (post-LN).
        per_head: parameters with a value for each query head.
        gate: projection to a single number, which that factor is made of.
        sizes: attributes by which the layer knows how large the block is, besides its matrices -> what they count.
    """

    writers: tuple[Matrix, ...]
    reader: Matrix
    modules: tuple[str, ...]
    norms: tuple[str, ...]
    head_norms: tuple[str, ...] = ()
    joint_norms: tuple[str, ...] = ()
    norm_behind: bool = False
    post_norm: bool = False
    per_head: tuple[str, ...] = ()
    gate: str | None = None
    sizes: Mapping[str, Counted] = field(default_factory=dict)


@dataclass(frozen=True)
class Experts:
    """The routed experts of a sparse layer. What the MLP's projections would be are stacks of matrices, one an expert.

    Attributes:
        module: the experts; called with tokens (T, H), the experts that each goes to (T, k), and their weights (T, k).
        router: the module that says these; a row of its weight belongs to an expert.
        sizes: as of `Wiring`.
        count, width, top_k: the configuration's fields for the experts of a layer, their channels, and those that a
            token goes to.
        normalized: a token's weights sum to 1; otherwise the weights of all experts do.
        bias: the router and both projections have biases.
        transposed: matrices are stored (in, out), and gate and up projection alternate channel by channel; otherwise
            the gates of all channels come first.
        writer, reader: the stacks' names in the module.
        norms: modules that go with the block.
        step, dense: the configuration's fields by which layers have an MLP instead: all but every so many-th, and those
            in a list. None: all layers have experts.
    """

    module: str
    router: str
    sizes: Mapping[str, Counted]
    count: str
    width: str
    top_k: str = "num_experts_per_tok"
    normalized: Flag = True
    bias: bool = False
    transposed: bool = False
    writer: str = "gate_up_proj"
    reader: str = "down_proj"
    norms: tuple[str, ...] = ("post_attention_layernorm",)
    step: str | None = None
    dense: str | None = None

    def are_in(self, layer: int, config: Any) -> bool:
        """Whether a layer has experts."""
        if self.dense and layer in getattr(config, self.dense):
            return False
        return not self.step or (layer + 1) % int(getattr(config, self.step)) == 0


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
    """How vLLM runs the family.

    Attributes:
        native: by a class of its own; otherwise by its transformers backend.
        takes_head_dim: that class reads `head_dim`; otherwise fewer heads need the transformers backend.
        native_unless: fields that must not be true, because that class ignores or refuses them.
        backend: the transformers backend runs the family, too.
        per_layer: the plug-in numprune-vllm runs it where layers differ, in either way.
        layers_as: another family whose class of vLLM's builds layers of any size, and fields that it then needs.
    """

    native: bool = True
    takes_head_dim: bool = True
    native_unless: tuple[str, ...] = ()
    backend: bool = True
    per_layer: bool = False
    layers_as: tuple[str, Mapping[str, Any]] | None = None

    def refused(self, config: Any) -> list[str]:
        """Return the settings of this configuration that vLLM's own class ignores or refuses."""
        return [field for field in self.native_unless if getattr(config, field)]


@dataclass(frozen=True)
class Family:
    """An architecture of transformers.

    Attributes:
        name: its `model_type`.
        attention, mlp: the blocks of a layer, in the order in which they write to the residual stream; no `mlp`: every
            layer has experts in its place.
        experts: of sparse layers, or None.
        shared: the MLP that all tokens of a sparse layer go through besides, or None.
        tasks: that its models are for.
        prefix: of the following paths, in models that are more than the base model (of encoders).
        layers, embedding, final_norm: paths in the model; no `final_norm`: the last layer's is the last.
        around: further tensors of the base model -> their shapes.
        projection: path of the linear map from embeddings to hidden states that there is where `embedding_size` is not
            the hidden size, or None.
        heads_of: task -> tensors of its models' heads, by full name, but for tied ones -> their shapes.
        untied: tensors of the head that are tied where the configuration ties embeddings.
        reserved_positions: learned positions that no token can have: up to that of padding.
        indexed: a layer is built from its index, too.
        positions: path of learned positions and how many they are beyond the context, or None.
        heads, kv_heads, width: the configuration's fields for a layer's sizes; no `kv_heads`: no grouping.
        shared_width: the configuration's field for the width of `shared`.
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
        per_layer: fields that say something of single layers, besides `layer_types` -> what; they are renumbered where
            layers are dropped.
        computed: ends of the names of tensors that a checkpoint may hold and its model does without: older versions of
            transformers stored what newer ones compute.
        vllm: how it is served.
    """

    name: str
    attention: Wiring
    mlp: Wiring | None = None
    experts: Experts | None = None
    shared: Wiring | None = None
    tasks: tuple[TaskName, ...] = ("causal-lm",)
    prefix: str = ""
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final_norm: str | None = "model.norm"
    around: Mapping[str, Shape] = field(default_factory=dict)
    projection: str | None = None
    heads_of: Mapping[TaskName, Mapping[str, Shape]] = field(default_factory=dict)
    untied: Mapping[str, Shape] = field(default_factory=lambda: {"lm_head.weight": ("vocab_size", "hidden_size")})
    positions: tuple[str, int] | None = None
    reserved_positions: bool = False
    indexed: bool = True
    heads: str = "num_attention_heads"
    kv_heads: str | None = "num_key_value_heads"
    width: str = "intermediate_size"
    shared_width: str = "shared_expert_intermediate_size"
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
    per_layer: Mapping[str, PerLayer] = field(default_factory=dict)
    computed: tuple[str, ...] = ("rotary_emb.inv_freq",)
    vllm: Vllm = field(default_factory=Vllm)

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
    *,
    bias: Flag = False,
    norms: tuple[str, ...] = ("post_attention_layernorm",),
    module: str = "mlp",
    **wiring: Any,
) -> Wiring:
    """Return an MLP whose inner values are act(gate) * up, by the names that most decoders use."""
    return Wiring(
        writers=(Matrix(f"{module}.gate_proj", ("gate",), bias), Matrix(f"{module}.up_proj", ("up",), bias)),
        reader=Matrix(f"{module}.down_proj", ("up",), bias),
        modules=(module,),
        norms=norms,
        **wiring,
    )


def plain_mlp(
    writer: str, reader: str, *, bias: Flag, norms: tuple[str, ...], modules: tuple[str, ...], post_norm: bool = False
) -> Wiring:
    """Return an MLP without a gate."""
    return Wiring(
        writers=(Matrix(writer, ("inner",), bias),),
        reader=Matrix(reader, ("inner",), bias),
        modules=modules,
        norms=norms,
        post_norm=post_norm,
    )


def linear(path: str, outputs: str, inputs: str) -> dict[str, Shape]:
    """Return the tensors of a linear map with a bias, whose sizes are these fields of the configuration."""
    return {f"{path}.weight": (outputs, inputs), f"{path}.bias": (outputs,)}


def norm(path: str, size: str) -> dict[str, Shape]:
    """Return the tensors of a layer norm, whose size is this field of the configuration."""
    return {f"{path}.weight": (size,), f"{path}.bias": (size,)}


def experts(*, router: str = "mlp.gate", module: str = "mlp.experts", width_attribute: str, **fields: Any) -> Experts:
    """Return routed experts by the names that most decoders use."""
    sizes: dict[str, Counted] = {
        f"{router}.num_experts": "experts",
        f"{module}.num_experts": "experts",
        f"{module}.{width_attribute}": "channels per expert",
    }
    return Experts(module=module, router=router, sizes=sizes, **fields)
