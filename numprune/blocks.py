"""The prunable blocks of a transformer as data: where their units are, and what surrounds them."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby, pairwise
from math import prod

from numprune.families import FAMILIES, Kind
from numprune.families.family import Counted, TaskName
from numprune.renumber import layers_left
from numprune.slices import GONE, Size, Slice


@dataclass(frozen=True)
class Routing:
    """Which experts a token goes to, and with what weights: softmax of the router's logits, of which some count.

    Attributes:
        router: path of the module in the layer; its logits (T, E) are the first of what it returns.
        top_k: experts of each token.
        normalized: the weights of those sum to 1; otherwise those of all experts do.
    """

    router: str
    top_k: int
    normalized: bool


@dataclass(frozen=True)
class Block:
    """One prunable block of one layer.

    A unit of attention is a KV group (one KV head and the query heads that share it, its members; a single head where
    there is no grouping), a unit of an MLP is one intermediate channel, a unit of experts is one of them, its members
    are its channels. A block of no units is skipped: its modules are not there.

    Attributes:
        path: of its layer in the model.
        units: how many it has.
        members: of each unit; 1 where units are not divided, and where there are none.
        consumer: the module in the layer that reads the units; its output is the block's.
        reader: the units' place in the consumer's weight.
        writers: their place in the matrices, and in their biases, that write them.
        linear: the weight among `writers`, and its part, that the block's output is linear in, the rest given; or None.
        shared: name -> shape of the tensors that go only with the whole block: norms, the consumer's bias.
        modules: that silence the block when they put out zeros.
        separable: units can go without changing what the others compute.
        norm_behind: a norm, or a factor that depends on the token, stands between the consumer and the residual stream.
        post_norms: norms after the sum of the block's output and the stream, which go with the block.
        field: the configuration's for its units. Where a stock architecture holds them, blocks of one field are alike.
        beside: it reads what the block before it in the layer does, not what that puts out.
        routing: of experts; None for other blocks.
        sizes: attribute of the layer's modules -> what it counts, where tensors do not tell all.
    """

    layer: int
    kind: Kind
    path: str
    units: int
    members: int
    consumer: str
    reader: Slice
    writers: tuple[Slice, ...]
    linear: tuple[Slice, int] | None
    shared: Mapping[str, tuple[int, ...]]
    modules: tuple[str, ...]
    separable: bool
    norm_behind: bool
    post_norms: tuple[str, ...]
    field: str
    beside: bool
    routing: Routing | None
    sizes: Mapping[str, Counted]

    @property
    def name(self) -> str:
        return f"layers.{self.layer}.{self.kind}"

    @property
    def slices(self) -> tuple[Slice, ...]:
        return (self.reader, *self.writers)

    @property
    def size(self) -> Size:
        return Size(self.units, self.members)

    @property
    def channels_per_unit(self) -> int:
        return self.reader.entries_per_unit(self.members)

    @property
    def channels(self) -> int:
        """Of the consumer's input. Unit `u` owns channels_per_unit of them, from `u * channels_per_unit` on."""
        return self.units * self.channels_per_unit

    @property
    def consumer_bias(self) -> bool:
        return f"{self.consumer}.bias" in self.shared

    @property
    def parameters_per_unit(self) -> int:
        return self.parameters(Size(1, self.members))

    def parameters(self, size: Size) -> int:
        """Return how many parameters the units of a block like this have at another size."""
        return size.units * sum(part.parameters_per_unit(size.members) for part in self.slices)

    @property
    def idle_parameters(self) -> int:
        """Of experts that a token does not go to."""
        if self.routing is None:
            return 0
        used = self.parameters(Size(1, self.members)) - self._router_parameters
        return (self.units - self.routing.top_k) * used

    @property
    def _router_parameters(self) -> int:
        """Of one expert."""
        assert self.routing is not None
        of_router = (part for part in self.writers if part.tensor.startswith(f"{self.routing.router}."))
        return sum(part.parameters_per_unit(self.members) for part in of_router)

    @property
    def shared_parameters(self) -> int:
        return sum(prod(shape) for shape in self.shared.values())

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Return name and shape of all tensors of the block, by their names in the layer."""
        if not self.units:
            return {}
        return {part.tensor: part.shape(self.size) for part in self.slices} | dict(self.shared)

    def counts(self) -> dict[str, int]:
        """Return the values of the attributes `sizes`."""
        counted: dict[Counted, int] = {
            "groups": self.units,
            "heads": self.units * self.members,
            "heads per group": self.members,
            "channels": self.channels,
            "experts": self.units,
            "channels per expert": self.members,
        }
        return {attribute: counted[what] for attribute, what in self.sizes.items()}

    def resized(self, size: Size) -> "Block":
        """Return the block at another size."""
        units, members = size if size.units else GONE
        return replace(self, units=units, members=members)


@dataclass(frozen=True)
class Anatomy:
    """A transformer as its blocks and what surrounds them."""

    family: str
    task: TaskName
    layers_path: str
    context: int  # tokens that a row can have
    hidden_size: int
    head_dim: int
    vocabulary: int
    blocks: tuple[Block, ...]  # attention before MLP before experts, first layer first: the order of the forward pass
    around: Mapping[str, tuple[int, ...]]  # name -> shape of the tensors that no block owns, tied ones once
    output_parameters: int  # of the matrix that gives each token's logits, tied or not
    bytes_per_value: int  # of the dtype that the configuration names
    sliding_window: int | None
    attention_differs: bool  # some layers look at a window, others at everything
    residual_scale: float  # by which a block's output is multiplied on its way into the residual stream
    numbering_field: str | None  # of the configuration, by which layers compute with their numbers: none can be dropped

    @property
    def layers(self) -> int:
        return self.blocks[-1].layer + 1

    @property
    def fixed_parameters(self) -> int:
        """Embeddings and the last norm."""
        return sum(prod(shape) for shape in self.around.values())

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Of blocks, in the order of the forward pass."""
        return tuple(dict.fromkeys(block.kind for block in self.blocks))

    @property
    def is_uniform(self) -> bool:
        """Every layer has the same sizes, so a stock architecture can hold it."""
        sizes = [{block.size for block in blocks} for blocks in self.alike]
        return all(len(found) == 1 and GONE not in found for found in sizes)

    @property
    def alike(self) -> tuple[tuple[Block, ...], ...]:
        """The blocks that a stock architecture gives one size, together, in the order of the forward pass."""
        fields = dict.fromkeys(block.field for block in self.blocks)
        return tuple(tuple(block for block in self.blocks if block.field == field) for field in fields)

    @property
    def has_parallel_blocks(self) -> bool:
        return any(block.beside for block in self.blocks)

    def of_kind(self, kind: str) -> tuple[Block, ...]:
        return tuple(block for block in self.blocks if block.kind == kind)

    def of_layer(self, index: int) -> tuple[Block, ...]:
        """Return the layer's blocks, in the order of the forward pass."""
        return self._by_layer[index]

    @cached_property
    def _by_layer(self) -> tuple[tuple[Block, ...], ...]:
        return by_layer(self.blocks)

    def keeping(self, sizes: Mapping[str, Size]) -> "Anatomy":
        """Return the anatomy with each block at the size `sizes[block.name]`."""
        return replace(self, blocks=beside_what_is_left([block.resized(sizes[block.name]) for block in self.blocks]))

    def without(self, dropped: Collection[int]) -> "Anatomy":
        """Return the anatomy with these layers dropped and the others renumbered."""
        left = enumerate(layers_left(self.layers, dropped))
        blocks = (
            replace(block, layer=new, path=f"{self.layers_path}.{new}")
            for new, old in left
            for block in self.of_layer(old)
        )
        return replace(self, blocks=tuple(blocks))

    def stock_holds(self, block: Block, size: Size) -> bool:
        """Whether a configuration that is not ours can hold a model whose blocks of that kind all have this size."""
        family = FAMILIES[self.family]
        heads = size.units * size.members
        if block.kind != "attention" or family.stock_heads == "any" or family.stand_in is not None:
            return True
        if family.stock_heads == "divisors":
            return self.hidden_size % heads == 0
        return heads * self.head_dim == self.hidden_size


def beside_what_is_left(blocks: Sequence[Block]) -> tuple[Block, ...]:
    """Return the blocks; one whose parallel neighbour is gone is beside nothing and reads its layer's input."""
    alone = {block.name for previous, block in pairwise(blocks) if not previous.units}
    return tuple(replace(block, beside=False) if block.beside and block.name in alone else block for block in blocks)


def by_layer(blocks: tuple[Block, ...]) -> tuple[tuple[Block, ...], ...]:
    """Return a model's blocks, first layer first, by layer."""
    return tuple(tuple(found) for _, found in groupby(blocks, key=lambda block: block.layer))
