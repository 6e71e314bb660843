"""The models whose latencies give those of blocks: layers of one kind, once and several times.

Where blocks can be removed, a model has the timed blocks alone, and the latency of a block of size s is

    t(s) = (T_R(s) - T_1(s)) / (R - 1)

with T_n the latency of the model with n copies. Where they cannot, because a norm follows the sum of each block, or
experts cannot be skipped, or layers differ in their attention, whole layers are timed, and the other blocks of the
layer have their smallest size. With L(…) the same difference for layers, a block of size s takes

    t(s) = L(s) - L(smallest) + c

where c is its share of a layer in which all blocks have their smallest size. How the shares divide that layer does not
matter as long as no block is removed, since their sum is the layer. No tensor library is needed.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from numprune.blocks import Anatomy, Block
from numprune.errors import InputError
from numprune.slices import GONE, Size

# Copies of a block together hold at least this, several times a CPU's cache: blocks of a whole model are not cached.
_COPIES_BYTES = 128 << 20
_FEWEST_COPIES = 4


@dataclass(frozen=True)
class TimedModel:
    """A model with `copies` layers of these blocks, (what they are timed as, size), and as little else as possible."""

    blocks: tuple[tuple[str, Size], ...]
    copies: int

    @property
    def name(self) -> str:
        return "-".join([*(f"{kind}-{size.units}x{size.members}" for kind, size in self.blocks), str(self.copies)])


Weights = Mapping[TimedModel, float]  # of the models' latencies in a sum


def within_layers(anatomy: Anatomy) -> bool:
    """Return whether blocks are timed within whole layers, because they cannot be removed."""
    followed = any(block.post_norms for block in anatomy.blocks)
    return followed or anatomy.attention_differs or bool(anatomy.of_kind("experts"))


def check_measurable(anatomy: Anatomy) -> None:
    """Refuse a model whose blocks cannot be timed by copies. Raises InputError."""
    if anatomy.numbering_field:
        raise InputError(f"timings: with {anatomy.numbering_field} each layer uses its index; not supported")
    if within_layers(anatomy):
        for block in anatomy.blocks:
            if not block.units:
                raise InputError(
                    f"timings: {block.name} was removed, and in {anatomy.family} only whole layers can be timed"
                )
    layers = layers_by_blocks(anatomy)
    for kind in {block.timed_as: None for block in anatomy.blocks if block.units}:
        if not any(kind in kinds for kinds in layers):
            raise InputError(f"timings: the model must have at least two blocks of kind {kind}, to time copies of one")


def layers_by_blocks(anatomy: Anatomy) -> dict[tuple[str, ...], list[int]]:
    """Return what is timed together -> the layers that have it, two or more; fewest blocks first, then most layers.

    So layers with experts come after those without, and their experts take what the other blocks leave.
    """
    found: dict[tuple[str, ...], list[int]] = {}
    for index in range(anatomy.layers):
        kinds = tuple(block.timed_as for block in anatomy.of_layer(index) if block.units)
        for timed in [kinds] if within_layers(anatomy) else [(kind,) for kind in kinds]:
            found.setdefault(timed, []).append(index)
    several = {kinds: layers for kinds, layers in found.items() if len(layers) > 1}
    return dict(sorted(several.items(), key=lambda item: (len(item[0]), -len(item[1]))))


@dataclass(frozen=True)
class TimedModels:
    """The models that give the latencies of a model's blocks.

    Attributes:
        anatomy: of the model; `check_measurable` accepts it.
        sizes: to time, by what blocks are timed as, as `timings.sizes_to_time` returns them.
        bytes_per_value: of the blocks' weights.
    """

    anatomy: Anatomy
    sizes: Mapping[str, Sequence[Size]]
    bytes_per_value: float

    @cached_property
    def hosts(self) -> dict[str, tuple[str, ...]]:
        """What blocks are timed as -> the blocks of the layers in which they are timed, themselves included."""
        found: dict[str, tuple[str, ...]] = {}
        for kinds in layers_by_blocks(self.anatomy):
            for kind in kinds:
                found.setdefault(kind, kinds)
        return found

    def copies(self, kind: str) -> int:
        """Return R for the layers in which a kind is timed."""
        kinds = self.hosts[kind]
        largest = max(block.parameters(block.size) for block in self.anatomy.blocks if block.timed_as in kinds)
        wanted = math.ceil(_COPIES_BYTES / (largest * self.bytes_per_value))
        return min(len(layers_by_blocks(self.anatomy)[kinds]), max(_FEWEST_COPIES, wanted))

    @cached_property
    def models(self) -> list[TimedModel]:
        """All of them, each once."""
        pairs = (self._pair(kind, size) for kind, sizes in self.sizes.items() for size in sizes)
        return list(dict.fromkeys(model for pair in pairs for model in pair))

    def _pair(self, kind: str, size: Size) -> tuple[TimedModel, TimedModel]:
        """Return the models with one and with R layers in which a block has this size."""
        blocks = tuple((other, size if other == kind else self.smallest(other)) for other in self.hosts[kind])
        return TimedModel(blocks, 1), TimedModel(blocks, self.copies(kind))

    def smallest(self, kind: str) -> Size:
        return min(self.sizes[kind], key=lambda size: (self._block(kind).parameters(size), size))

    def _block(self, kind: str) -> Block:
        """Return the largest block that is timed as this."""
        blocks = (block for block in self.anatomy.blocks if block.timed_as == kind)
        return max(blocks, key=lambda block: block.parameters(block.size))

    def parameters(self, model: TimedModel) -> int:
        """Return the parameters of a model's prunable units."""
        return model.copies * sum(self._block(kind).parameters(size) for kind, size in model.blocks)

    def built(self, model: TimedModel) -> tuple[Anatomy, list[int]]:
        """Return the anatomy of a model, and the layers that it does not have.

        The first layer keeps its attention: decoders need a KV cache. It has no part in a difference of two models.
        """
        kinds = tuple(kind for kind, _ in model.blocks)
        kept = layers_by_blocks(self.anatomy)[kinds][: model.copies]
        dropped = [index for index in range(self.anatomy.layers) if index not in kept]
        left, timed = self.anatomy.without(dropped), dict(model.blocks)
        sizes = {
            block.name: timed.get(block.timed_as)
            or (self.smallest(block.timed_as) if block.kind == "attention" and not block.layer else GONE)
            for block in left.blocks
        }
        return left.keeping(sizes), dropped

    def of_block(self, kind: str, size: Size) -> Weights:
        """Return the weights whose sum is the latency of a block of this size."""
        one, several = self._pair(kind, size)
        if len(self.hosts[kind]) == 1:
            return _layer(one, several)
        smallest = _layer(*self._pair(kind, self.smallest(kind)))
        return _sum([(1, _layer(one, several)), (-1, smallest), (1, self._shares[kind])])

    @cached_property
    def _shares(self) -> dict[str, Weights]:
        """The latency of the smallest block of each kind: layers that have no other kinds in common share equally."""
        found: dict[str, Weights] = {}
        for kinds in dict.fromkeys(self.hosts.values()):
            new = [kind for kind in kinds if self.hosts[kind] == kinds]
            layer = _layer(*self._pair(new[0], self.smallest(new[0])))
            rest = _sum([(1, layer), *((-1, found[kind]) for kind in kinds if kind not in new)])
            found |= dict.fromkeys(new, _sum([(1 / len(new), rest)]))
        return found

    def around(self) -> Weights:
        """Return the weights whose sum is the latency around the blocks: that of one layer, less the layer."""
        kind = next(kind for kind in self.sizes if "attention" in kind)  # other blocks would come with an attention
        one, several = self._pair(kind, self.smallest(kind))
        return _sum([(1, {one: 1.0}), (-1, _layer(one, several))])


def _layer(one: TimedModel, several: TimedModel) -> Weights:
    share = 1 / (several.copies - 1)
    return {several: share, one: -share}


def _sum(parts: Sequence[tuple[float, Weights]]) -> Weights:
    total: dict[TimedModel, float] = {}
    for factor, weights in parts:
        for model, weight in weights.items():
            total[model] = total.get(model, 0.0) + factor * weight
    return {model: weight for model, weight in total.items() if weight}
