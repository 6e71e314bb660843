"""The blocks of one layer, read from its configuration: their units and members, and the tensors that share them."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from numprune.around import norm_tensors
from numprune.blocks import Block, Routing
from numprune.errors import InputError
from numprune.families import Family, Kind, Matrix
from numprune.families.family import LINEAR_PARTS, Experts, Part, Wiring
from numprune.fields import require_sizes
from numprune.slices import GONE, Extent, Size, Slice
from numprune.stages import Stage


class Layer(NamedTuple):
    """One layer: its number, its path in the whole model, its configuration, and its stage, if any.

    `own`: the configuration may have sizes that only a per-layer configuration has.
    """

    number: int
    path: str
    sizes: Any
    stage: Stage | None
    own: bool


def layer_blocks(family: Family, config: Any, layer: Layer) -> Iterator[Block]:
    """Yield the blocks of one layer: attention, MLP, experts. Raises InputError if its sizes contradict each other."""
    sizes, number = layer.sizes, layer.number
    heads, kv_heads, head_dim, width = layer_sizes(family, layer)
    skipped = getattr(sizes, "skip", [])
    head, channel = Extent(head_dim), Extent(1)
    extents: dict[Part, Extent] = {"query": Extent(head_dim, divided=True), "key": head, "value": head}
    extents |= {"gate": channel, "up": channel, "inner": channel}
    groups, members = kv_heads, heads // kv_heads
    if family.attention.scores is not None:
        members = _dims_of_scores(family.attention.scores, layer) or head_dim
        extents |= dict.fromkeys(("query", "key"), Extent(1, divided=True))

    def block(kind: Kind, wiring: Wiring, field: str, size: Size, beside: bool = False) -> Block:
        size = GONE if kind in skipped else size
        return _block(family, wiring, config, layer, kind, field, size, extents, beside)

    attention = block("attention", family.attention, family.kv_heads or family.heads, Size(groups, members))
    yield replace(attention, sliding=attention_differs(config) and config.layer_types[number] == "sliding_attention")
    if family.experts is None or not family.experts.are_in(number, config):
        mlp = family.mlp_of(config)
        assert mlp is not None
        yield block("mlp", mlp, family.width, Size(width), beside=family.flag(family.parallel, config))
        return
    # The experts come last, so that their refit compensates for the shared one.
    if family.shared is not None:
        require_sizes(sizes, family.shared_width, where=f"layer {number}: ")
        yield block("mlp", family.shared, family.shared_width, Size(getattr(sizes, family.shared_width)))
    yield _experts_block(family, family.experts, layer)


def attention_differs(config: Any) -> bool:
    """Return whether only some layers have sliding windows."""
    return len(set(getattr(config, "layer_types", None) or ())) > 1


def sliding_window(config: Any) -> int | None:
    """Return the tokens that a layer with a sliding window sees; None: no layer has one."""
    types = getattr(config, "layer_types", None)
    if types and "sliding_attention" not in types:
        return None
    return getattr(config, "sliding_window", None) or None


def layer_sizes(family: Family, layer: Layer) -> tuple[int, int, int, int]:
    """Return query heads, KV heads, channels of a head and the MLP's width. Raises InputError."""
    sizes, where = layer.sizes, f"layer {layer.number}: "
    require_sizes(sizes, family.heads, where=where)
    require_sizes(sizes, *filter(None, (family.kv_heads, "head_dim")), where=where, optional=True)
    heads = getattr(sizes, family.heads)
    kv_heads = (getattr(sizes, family.kv_heads) if family.kv_heads else None) or heads
    if heads % kv_heads:
        raise InputError(f"{where}{family.heads}={heads} is not a multiple of {family.kv_heads}={kv_heads}")
    head_dim = getattr(sizes, "head_dim", None) or sizes.hidden_size // heads
    return heads, kv_heads, head_dim, _width(family, layer, where)


def _dims_of_scores(field: str, layer: Layer) -> int | None:
    """Return the dimensions of queries and keys in one layer's configuration; None: those of a head."""
    if not layer.own:
        return None
    require_sizes(layer.sizes, field, where=f"layer {layer.number}: ", optional=True)
    found: int | None = getattr(layer.sizes, field, None)
    return found


def _width(family: Family, layer: Layer, where: str) -> int:
    """Return the MLP's width in one layer's configuration; `where`: the beginning of messages."""
    sizes, hidden = layer.sizes, layer.sizes.hidden_size
    if family.ratio is not None and not (layer.own and hasattr(sizes, family.width)):
        require_sizes(sizes, family.ratio, where=where)
        gated = family.mlp_of(sizes) is not family.mlp
        return family.width_of(getattr(sizes, family.ratio), hidden, gated=gated)
    require_sizes(sizes, family.width, where=where, optional=family.default_width is not None)
    width: int | None = getattr(sizes, family.width)
    if width is None:
        assert family.default_width is not None
        width = family.default_width * hidden
    return width


def _block(
    family: Family,
    wiring: Wiring,
    config: Any,
    layer: Layer,
    kind: Kind,
    field: str,
    size: Size,
    extents: Mapping[Part, Extent],
    beside: bool = False,
) -> Block:
    hidden = layer.sizes.hidden_size

    def weight(matrix: Matrix, dim: int) -> Slice:
        parts = tuple(extents[part] for part in matrix.parts)
        return Slice(f"{matrix.path}.weight", dim, parts, hidden, family.interleaved)

    writers, linear = [], None
    for matrix in wiring.writers:
        place = weight(matrix, 1 if family.transposed else 0)
        writers.append(place)
        if family.flag(matrix.bias, config):
            writers.append(replace(place, tensor=f"{matrix.path}.bias", dim=0, width=None))
        for index, part in enumerate(matrix.parts):
            if part in LINEAR_PARTS:
                linear = (place, index)
    writers += [Slice(name, 0, (Extent(1, divided=True),), None) for name in wiring.per_head]
    if wiring.tables and family.stages is not None:
        places = (2 * getattr(config, family.stages.window) - 1) ** 2  # of a token relative to another in a window
        writers += [Slice(name, 1, (Extent(1, divided=True),), places, table=True) for name in wiring.tables]
    shared: dict[str, tuple[int, ...]] = {f"{wiring.gate}.weight": (1, hidden)} if wiring.gate else {}
    for norm in wiring.norms:
        shared |= norm_tensors(family, norm, hidden)
    shared |= {f"{norm}.weight": (extents["key"].entries,) for norm in wiring.head_norms}
    for norm, extent in zip(wiring.joint_norms, (extents["query"], extents["key"]), strict=False):
        shared[f"{norm}.weight"] = (size.units * extent.of_unit(size.members),)
    if family.flag(wiring.reader.bias, config):
        shared[f"{wiring.reader.path}.bias"] = (hidden,)
    if wiring.scale:
        shared[wiring.scale] = (hidden,)
    return Block(
        layer=layer.number,
        kind=kind,
        path=layer.path,
        units=size.units,
        members=size.members,
        consumer=wiring.reader.path,
        reader=weight(wiring.reader, 0 if family.transposed else 1),
        writers=tuple(writers),
        linear=linear,
        shared=shared,
        head_norms=tuple(f"{norm}.weight" for norm in (*wiring.head_norms, *wiring.joint_norms)),
        modules=wiring.modules,
        separable=not wiring.joint_norms,
        norm_behind=wiring.norm_behind,
        post_norms=wiring.norms if wiring.post_norm else (),
        scale=wiring.scale,
        scores=(wiring.writers[0].path, wiring.writers[1].path) if wiring.scores else None,
        field=field,
        beside=beside,
        routing=None,
        sizes=wiring.sizes,
        stage=layer.stage,
    )


def _experts_block(family: Family, experts: Experts, layer: Layer) -> Block:
    """Return the block of one layer's configuration.

    Raises:
        InputError: a size is not a whole number, or there are fewer experts than a token is routed to.
    """
    sizes, where = layer.sizes, f"layer {layer.number}: "
    require_sizes(sizes, experts.count, experts.width, experts.top_k, where=where)
    count, width, top_k = (getattr(sizes, field) for field in (experts.count, experts.width, experts.top_k))
    if count < top_k:
        raise InputError(f"{where}{experts.count}={count} is less than {experts.top_k}={top_k}")
    hidden, module = sizes.hidden_size, experts.module
    channel, expert = Extent(1, divided=True), Extent(1)
    pair = (Extent(2, divided=True),) if experts.transposed else (channel, channel)
    inputs, outputs = (1, 2) if experts.transposed else (2, 1)
    up = Slice(f"{module}.{experts.writer}", outputs, pair, hidden, stacked=True)
    down = Slice(f"{module}.{experts.reader}", inputs, (channel,), hidden, stacked=True)
    router = Slice(f"{experts.router}.weight", 0, (expert,), hidden)
    biases = (
        replace(up, tensor=f"{up.tensor}_bias", dim=1, width=None),
        Slice(f"{down.tensor}_bias", 0, (expert,), hidden),
        replace(router, tensor=f"{experts.router}.bias", width=None),
    )
    return Block(
        layer=layer.number,
        kind="experts",
        path=layer.path,
        units=count,
        members=width,
        consumer=module,
        reader=down,
        writers=(up, router, *(biases if experts.bias else ())),
        linear=None,
        shared={name: shape for norm in experts.norms for name, shape in norm_tensors(family, norm, hidden).items()},
        head_norms=(),
        modules=(module,),
        separable=True,
        norm_behind=False,
        post_norms=(),
        scale=None,
        scores=None,
        field=experts.count,
        beside=family.shared is not None,
        routing=Routing(experts.router, top_k, family.flag(experts.normalized, sizes)),
        sizes=experts.sizes,
        stage=None,
    )
