"""The schema in which an architecture is described: a `Family` of `Matrix`es, read by anatomy.py.

Paths are those of modules in transformers' modeling code: of a layer's modules inside the layer, of all others inside
the model. Fields that are strings name fields of the configuration.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

TaskName = Literal["causal-lm", "masked-lm", "classification", "embedding", "image-classification"]
Kind = Literal["attention", "mlp", "experts"]
Part = Literal["query", "key", "value", "gate", "up", "inner"]
Counted = Literal["groups", "heads", "heads per group", "channels", "experts", "channels per expert"]
Shape = tuple[str, ...]  # fields of the configuration that are a tensor's sizes; "2 * field": twice that
Flag = bool | str  # a string: the value of that configuration field
# The meaning of a per-layer field of the configuration: a list with an `entry` per layer, the number of `first` layers
# to which something applies, a list of the `layers` to which it applies, that a layer computes with its own `index`, or
# the `step` between the layers to which it applies.
PerLayer = Literal["entry", "first", "layers", "index", "step"]

# The parts of a block's writers in which its output is linear, everything else fixed.
LINEAR_PARTS: frozenset[Part] = frozenset({"value", "up"})


@dataclass(frozen=True)
class Matrix:
    """A projection of a block.

    Attributes:
        path: of its module in the layer.
        parts: the parts of a unit in it: for a KV group, its `query` heads, its `key` and its `value` head; for an MLP
            channel, its `gate` and its `up` projection or, without a gate, its `inner` value.
        bias: whether it has one.
    """

    path: str
    parts: tuple[Part, ...]
    bias: Flag = False


@dataclass(frozen=True)
class Wiring:
    """One block of a layer: the projections that write and read its units, and its place in the residual stream.

    Attributes:
        writers: the projections whose outputs are the units.
        reader: the projection that reads them; its output is the block's.
        modules: of the block, for attention with the weights' module first; if all of them output zeros (and the norms
            after it do nothing), only the layer's other block remains.
        norms: modules that are removed with the block.
        head_norms: norms over a head's queries or keys, shared by all heads.
        joint_norms: norms over the queries or keys of all heads together: no head can be removed without changing
            others.
        norm_behind: a norm, or a factor that depends on the token, lies between the reader and the residual stream.
        post_norm: `norms` come after the sum of the block's output and the stream (post-LN).
        scale: factors of the block's output on its way into the residual stream, one for each coordinate (layer scale).
        scores: the field of a per-layer configuration for the dimensions of a head's queries and keys, where the model
            computes nothing from them but their products: no rotary positions, no norms, no grouping. They are then the
            members of a unit. None: query heads are.
        per_head: parameters with a value for each query head.
        tables: parameters with a column for each query head, and a row for each place of a token relative to another
            in a window.
        gate: projection to a single number, from which that factor is computed.
        sizes: attributes of the layer's modules, other than matrices, that depend on the block's size -> what they
            count.
    """

    writers: tuple[Matrix, ...]
    reader: Matrix
    modules: tuple[str, ...]
    norms: tuple[str, ...]
    head_norms: tuple[str, ...] = ()
    joint_norms: tuple[str, ...] = ()
    norm_behind: bool = False
    post_norm: bool = False
    scale: str | None = None
    scores: str | None = None
    per_head: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()
    gate: str | None = None
    sizes: Mapping[str, Counted] = field(default_factory=dict)


@dataclass(frozen=True)
class Experts:
    """The routed experts of a sparse layer. The MLP's projections become stacks of matrices, one per expert.

    Attributes:
        module: the experts; called with tokens (T, H), the experts of each token (T, k), and their weights (T, k).
        router: the module that chooses them; each row of its weight belongs to an expert.
        sizes: as in `Wiring`.
        count, width, top_k: the configuration's fields for the number of experts, their channels, and the experts per
            token.
        normalized: a token's weights sum to 1; otherwise the weights of all experts do.
        bias: the router and both projections have biases.
        transposed: matrices are stored (in, out), and gate and up projection alternate channel by channel; otherwise
            the gates of all channels come first.
        writer, reader: the stacks' names in the module.
        norms: modules that go with the block.
        stored: names of one expert's gate, up and down projection in a checkpoint, which stores experts one by one;
            None: it stores the stacks.
        step, dense: the configuration's fields that give layers an MLP instead: all except every `step`-th layer, and
        those in the list `dense`. None: all layers have experts.
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
    stored: tuple[str, str, str] | None = ("gate_proj", "up_proj", "down_proj")
    step: str | None = None
    dense: str | None = None

    def are_in(self, layer: int, config: Any) -> bool:
        """Return whether a layer has experts."""
        if self.dense and layer in getattr(config, self.dense):
            return False
        return not self.step or (layer + 1) % int(getattr(config, self.step)) == 0


@dataclass(frozen=True)
class Patches:
    """The embeddings of an image: tokens that every image has, then one for each of its patches.

    Attributes:
        tokens: parameters of the former.
        positions: parameter of the learned positions of all, or None.
        masked: parameter of the token that replaces patches in pretraining, present if `use_mask_token` is set, or
            None.
        square: images must be square, because the model interpolates the positions of others.
    """

    tokens: tuple[str, ...]
    positions: str | None
    masked: str | None = None
    square: bool = False


@dataclass(frozen=True)
class Stages:
    """Stages of layers, with attention in windows. Between two of them, 2 x 2 tokens become one of twice the width.

    A stock configuration has no fields for single layers; those of a per-layer configuration are the family's `heads`
    and `width`.

    Attributes:
        layers: path of a stage's layers in the stage.
        merging: path in the stage of what merges tokens behind its layers; the last stage has none.
        norm, reduction: paths in it of its norm and its matrix, which has no bias.
        depths, heads: the configuration's lists of each stage's layers, and of the heads in each of these.
        width: its field for the hidden size of the first stage.
        ratio: for the width of MLPs in hidden sizes.
        window: for the tokens along the side of a window.
    """

    layers: str
    merging: str
    norm: str
    reduction: str
    depths: str
    heads: str
    width: str
    ratio: str
    window: str


@dataclass(frozen=True)
class StandIn:
    """Another family with the same computation, whose configuration accepts head counts that this one refuses.

    Attributes:
        name: of that family.
        unless: fields that must not be true.
        dropped: further fields that it does not have.
        fields: that it needs.
    """

    name: str
    unless: tuple[str, ...]
    dropped: tuple[str, ...]
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class Windows:
    """How a configuration gives single layers a sliding window, with `layer_types` and `sliding_window`.

    Attributes:
        family: another family with the same computation that has these fields; None: the family itself.
        fields: that must also be set.
        entries: fields with a value for each layer, which all have this one.
        dropped: fields that the other family does not have.
    """

    family: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    entries: Mapping[str, Any] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()


@dataclass(frozen=True)
class Vllm:
    """How vLLM runs the family.

    Attributes:
        native: with a class of its own; otherwise with the transformers backend.
        takes_head_dim: that class reads `head_dim`; otherwise fewer heads need the transformers backend.
        native_unless: fields that must not be true, because that class ignores or refuses them.
        backend: the transformers backend runs the family, too; without it and `native`, vLLM does not run the family.
        per_layer: the plug-in numprune-vllm runs it with layers of different sizes, in either way.
        alternating: that class has windows in every second layer from the first on, whatever `layer_types` say.
        layers_as: another family whose vLLM class builds layers of any size, and the fields that it then needs.
    """

    native: bool = True
    takes_head_dim: bool = True
    native_unless: tuple[str, ...] = ()
    backend: bool = True
    per_layer: bool = False
    alternating: bool = False
    layers_as: tuple[str, Mapping[str, Any]] | None = None

    @property
    def runs(self) -> bool:
        return self.native or self.backend

    def refused(self, config: Any) -> list[str]:
        """Return the settings of this configuration that vLLM's own class ignores or refuses."""
        return [field for field in self.native_unless if getattr(config, field)]


@dataclass(frozen=True)
class Family:
    """An architecture of transformers.

    Attributes:
        name: its `model_type`.
        attention, mlp: the blocks of a layer, in the order in which they write to the residual stream; no `mlp`: every
            layer has experts instead.
        gated: a field of the configuration, and the MLP that layers have instead of `mlp` if it is true; or None.
        experts: of sparse layers, or None.
        shared: the MLP that processes all tokens of a sparse layer in addition, or None.
        tasks: of its models.
        prefix: of the following paths, in models that contain the base model (encoders).
        layers, embedding, final_norm: paths in the model; no `final_norm`: there is none after the last layer.
        patches: the rest of the embeddings if rows are images, whose patches `embedding` reads; None: rows are tokens.
        stages: if layers are in stages; `layers` is then the path of these. None: all layers follow one another.
        around: further tensors of the base model -> their shapes.
        projection: path of the linear map from embeddings to hidden states, present if `embedding_size` differs from
            the hidden size, or None.
        heads_of: task -> tensors of its models' heads, by full name and without tied ones -> their shapes.
        untied: tensors of the head that are tied if the configuration ties embeddings.
        reserved_positions: learned positions that no token can have: up to that of padding.
        indexed: the constructor of a layer takes its index, too.
        positions: path of learned positions and their number beyond the context, or None.
        heads, kv_heads, width: the configuration's fields for a layer's sizes; no `kv_heads`: no grouping.
        shared_width: the configuration's field for the width of `shared`.
        default_width: the MLP's width in hidden sizes if `width` is not set; None: it must be set.
        ratio: the field with which a stock configuration gives the MLP's width (`width_of`); only a per-layer one then
            has `width`. None: `width` is a field of both.
        norm_bias: norms have a bias.
        class_tokens: of an image generator, the number of class tokens or the configuration's field for it (see
            codes.py); None: of all other models.
        returns_tuple: a layer returns a pair, the hidden states and something that may be None.
        transposed: matrices are stored (in, out).
        interleaved: in a matrix with several parts, all parts of a unit are adjacent; otherwise the first parts of all
            units come first.
        parallel: both blocks read the input of the layer.
        residual_scale: the field of the factor by which a block's output is multiplied, or None.
        scales_embeddings: they are multiplied by the square root of the hidden size.
        stock_heads: the head counts that the stock configuration accepts: `any`, `divisors` of the hidden size, or only
            `all` that fill the hidden size.
        stand_in: the family for other head counts, or None.
        windows: how single layers get a sliding window; None: they cannot, or vLLM ignores which of them have one.
        requires: field, or "field.key" -> the values to which this description applies.
        equal: field -> another that must have the same value.
        attention_implementation: of transformers.
        per_layer: per-layer fields other than `layer_types` -> their meaning; they are renumbered if layers are
            dropped.
        renamed: part of a tensor's name in the model -> its replacement in a checkpoint.
        computed: suffixes of tensors that a checkpoint may contain although its model computes them: older versions of
            transformers stored them.
        vllm: how it is served.
    """

    name: str
    attention: Wiring
    mlp: Wiring | None = None
    gated: tuple[str, Wiring] | None = None
    experts: Experts | None = None
    shared: Wiring | None = None
    tasks: tuple[TaskName, ...] = ("causal-lm",)
    prefix: str = ""
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final_norm: str | None = "model.norm"
    patches: Patches | None = None
    stages: Stages | None = None
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
    ratio: str | None = None
    norm_bias: bool = False
    class_tokens: int | str | None = None
    returns_tuple: bool = False
    transposed: bool = False
    interleaved: bool = False
    parallel: Flag = False
    residual_scale: str | None = None
    scales_embeddings: bool = False
    stock_heads: Literal["any", "divisors", "all"] = "any"
    stand_in: StandIn | None = None
    windows: Windows | None = None
    requires: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    equal: Mapping[str, str] = field(default_factory=dict)
    attention_implementation: str = "sdpa"
    per_layer: Mapping[str, PerLayer] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    computed: tuple[str, ...] = ("rotary_emb.inv_freq",)
    vllm: Vllm = field(default_factory=Vllm)

    def flag(self, flag: Flag, config: Any) -> bool:
        """Return the value of the family or of the configuration."""
        return flag if isinstance(flag, bool) else bool(getattr(config, flag))

    def mlp_of(self, config: Any) -> Wiring | None:
        """Return the MLP of the layers of this configuration that have no experts."""
        return self.gated[1] if self.gated and getattr(config, self.gated[0]) else self.mlp

    def width_of(self, ratio: int, hidden_size: int, *, gated: bool) -> int:
        """Return the MLP's width: `ratio` hidden sizes; with a gate two thirds of that, rounded up to a multiple of 8.

        Source: Dinov2MLP and Dinov2SwiGLUFFN of transformers.
        """
        width = ratio * hidden_size
        return (width * 2 // 3 + 7) // 8 * 8 if gated else width

    def ratio_of(self, width: int, hidden_size: int, *, gated: bool) -> int | None:
        """Return the ratio whose `width_of` is this width, or None."""
        nearest = round(width * (1.5 if gated else 1) / hidden_size)
        found = (ratio for ratio in (nearest, nearest - 1) if ratio > 0)
        return next((ratio for ratio in found if self.width_of(ratio, hidden_size, gated=gated) == width), None)

    def stored_name(self, name: str) -> str:
        """Return the name in a checkpoint of a tensor of the model."""
        for part, stored in self.renamed.items():
            name = name.replace(part, stored)
        return name


def attention(
    *,
    bias: Flag = False,
    reader_bias: Flag = False,
    norms: tuple[str, ...] = ("input_layernorm",),
    module: str = "self_attn",
    reader: str = "o_proj",
    sizes: Mapping[str, Counted] | None = None,
    scores: str | None = None,
    **wiring: Any,
) -> Wiring:
    """Return attention with separate projections of queries, keys and values, by the names that most decoders use."""
    parts: tuple[tuple[str, Part], ...] = (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"))
    return Wiring(
        writers=tuple(Matrix(f"{module}.{name}", (part,), bias) for name, part in parts),
        reader=Matrix(f"{module}.{reader}", ("value" if scores else "query",), reader_bias),
        modules=(module,),
        norms=norms,
        sizes={f"{module}.num_key_value_groups": "heads per group"} if sizes is None else sizes,
        scores=scores,
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
    writer: str, reader: str, *, bias: Flag, norms: tuple[str, ...], modules: tuple[str, ...], **wiring: Any
) -> Wiring:
    """Return an MLP without a gate."""
    return Wiring(
        writers=(Matrix(writer, ("inner",), bias),),
        reader=Matrix(reader, ("inner",), bias),
        modules=modules,
        norms=norms,
        **wiring,
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
