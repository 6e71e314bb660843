"""The units that each layer keeps, by kind of block."""

import re
from collections.abc import Collection, Iterator, Mapping

KINDS: Mapping[str, str] = {
    "attention": "KV groups",
    "attention.query_heads": "Query heads",
    "attention.qk_dims": "Query and key dimensions",
    "mlp": "MLP channels",
    "experts": "Experts",
    "experts.channels": "Channels per expert",
}
BLOCKS: Mapping[str, str] = {"attention": "Attention", "mlp": "MLPs", "experts": "Experts"}
_BLOCK = re.compile(rf"(?:.+\.)?layers\.(\d{{1,6}})\.({'|'.join(map(re.escape, KINDS))})")

_SHOWN = 20

Units = dict[int, tuple[int, int]]  # layer -> (kept, of)


def by_kind(kept_units: Mapping[str, tuple[int, int]]) -> dict[str, Units]:
    """`layers.3.mlp` → {"mlp": {3: (kept, of)}}, layers ascending; see `others`."""
    kinds: dict[str, Units] = {}
    for name, units in kept_units.items():
        if match := _BLOCK.fullmatch(name):
            kinds.setdefault(match[2], {})[int(match[1])] = units
    return {kind: dict(sorted(kinds[kind].items())) for kind in KINDS if kind in kinds}


def layer_of(block: str) -> int | None:
    """The layer's number in a block's name; None for other names."""
    match = _BLOCK.fullmatch(block)
    return int(match[1]) if match else None


def without(units: Units, layers: Collection[int]) -> Units:
    """Only the remaining layers, if some are dropped."""
    gone = frozenset(layers)
    return {layer: found for layer, found in units.items() if layer not in gone}


def listed(layers: Collection[int]) -> str:
    """Layer numbers in ascending order; only the first ones if there are many."""
    numbers = ", ".join(map(str, sorted(layers)[:_SHOWN]))
    return f"{numbers} and {len(layers) - _SHOWN} more" if len(layers) > _SHOWN else numbers


def others(kept_units: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """The blocks that `by_kind` omits."""
    return {name: units for name, units in kept_units.items() if not _BLOCK.fullmatch(name)}


def ranges(units: Units) -> Iterator[tuple[int, int, tuple[int, int]]]:
    """Yield (first layer, last layer, (kept, of)) for runs of layers that keep the same."""
    first = last = None
    for layer, kept in units.items():
        if first is not None and last is not None:
            if layer == last + 1 and kept == units[first]:
                last = layer
                continue
            yield first, last, units[first]
        first = last = layer
    if first is not None and last is not None:
        yield first, last, units[first]
