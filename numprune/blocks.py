"""The prunable blocks of a transformer as data: the location of their units, and the tensors around them."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby, pairwise
from math import prod

from numprune.families import FAMILIES, Kind
from numprune.families.family import Counted, TaskName
from numprune.renumber import layers_left
from numprune.slices import GONE, Size, Slice
from numprune.stages import Stage


@dataclass(frozen=True)
class Routing:
    """How tokens are routed to experts: softmax of the router's logits, of which the top k count.

    Attributes:
        router: path of the module in the layer; its first output is the logits (T, E).
        top_k: experts per token.
        normalized: the weights of the top k sum to 1; otherwise those of all experts do.
    """

    router: str
    top_k: int
    normalized: bool


@dataclass(frozen=True)
class Block:
    """One prunable block of one layer.

    A unit of attention is a KV group: one KV head and the query heads that share it, its members (a single head if
    there is no grouping); where `scores` says so, it is a head, whose members are the dimensions of its queries and
    keys. A unit of an MLP is one intermediate channel. A unit of experts is one expert; its members
    are its channels. A block without units is skipped: its modules do not exist.

    Attributes:
        path: of its layer in the model.
        units: how many it has.
        members: of each unit; 1 if units are not divided, or there are none.
        consumer: the module in the layer that reads the units; its output is the block's.
        reader: location of the units in the consumer's weight.
        writers: their location in the matrices and biases that write them.
        linear: the weight among `writers`, and its part, in which the block's output is linear, the rest fixed; or
            None.
        shared: name -> shape of the tensors that are removed only with the whole block: norms, the consumer's bias.
        head_norms: those of `shared` that norm queries or keys. The others have the hidden size as last dimension.
        modules: that silence the block when their outputs are zero.
        separable: units can be removed without changing what the others compute.
        norm_behind: a norm, or a factor that depends on the token, lies between the consumer and the residual stream.
        post_norms: norms after the sum of the block's output and the stream, which are removed with the block.
        scale: the name in `shared` of the factors of the consumer's output (layer scale), or None. Layers are used with
            factors of 1 (layers.py).
        scores: the projections of queries and keys, if members are their dimensions; None otherwise.
        field: of the configuration, for its units. In a stock architecture, blocks of one field have equal sizes.
        beside: parallel: it reads the same input as the preceding block in the layer, not that block's output.
        routing: of experts; None for other blocks.
        sizes: attribute of the layer's modules -> what it counts, for sizes that tensors do not determine.
        stage: that its layer is in, of a model in stages.
        sliding: attention with a sliding window, in a model where other layers have none.
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
    head_norms: tuple[str, ...]
    modules: tuple[str, ...]
    separable: bool
    norm_behind: bool
    post_norms: tuple[str, ...]
    scale: str | None
    scores: tuple[str, str] | None
    field: str
    beside: bool
    routing: Routing | None
    sizes: Mapping[str, Counted]
    stage: Stage | None
    sliding: bool = False

    @property
    def name(self) -> str:
        return f"layers.{self.layer}.{self.kind}"

    @property
    def timed_as(self) -> str:
        """What a block has to share with another of equal size to take the same time."""
        return f"sliding-{self.kind}" if self.sliding else self.kind

    @property
    def slices(self) -> tuple[Slice, ...]:
        return (self.reader, *self.writers)

    @property
    def size(self) -> Size:
        return Size(self.units, self.members)

    def heads(self, size: Size) -> int:
        """Return the query heads of an attention block of this size."""
        return size.units if self.scores else size.units * size.members

    @property
    def channels_per_unit(self) -> int:
        return self.reader.entries_per_unit(self.members)

    @property
    def channels(self) -> int:
        """Input channels of the consumer. Unit `u` owns channels_per_unit of them, from `u * channels_per_unit`."""
        return self.units * self.channels_per_unit

    @property
    def hidden_size(self) -> int:
        """Width of the stream that the block reads and writes."""
        assert self.reader.width is not None
        return self.reader.width

    @property
    def in_windows(self) -> bool:
        """It attends in windows, whose positions are not in the order of the tokens."""
        return self.stage is not None and self.kind == "attention"

    @property
    def multiple(self) -> int:
        """In a stock configuration, it has so many times the units that a block of its field in the first stage has."""
        return 1 if self.stage is None else self.stage.multiple

    @property
    def consumer_bias(self) -> bool:
        return f"{self.consumer}.bias" in self.shared

    @property
    def parameters_per_unit(self) -> int:
        return self.parameters(Size(1, self.members))

    def parameters(self, size: Size) -> int:
        """Return how many parameters the units would have at another size of the block."""
        return size.units * sum(part.parameters_per_unit(size.members) for part in self.slices)

    @property
    def idle_parameters(self) -> int:
        """Parameters of the experts that a token is not routed to."""
        if self.routing is None:
            return 0
        used = self.parameters(Size(1, self.members)) - self._router_parameters
        return (self.units - self.routing.top_k) * used

    @property
    def table_parameters(self) -> int:
        """Parameters of tables, which are added to attention's logits."""
        return self.units * sum(part.parameters_per_unit(self.members) for part in self.writers if part.table)

    @property
    def _router_parameters(self) -> int:
        """Router parameters of one expert."""
        assert self.routing is not None
        of_router = (part for part in self.writers if part.tensor.startswith(f"{self.routing.router}."))
        return sum(part.parameters_per_unit(self.members) for part in of_router)

    @property
    def norms(self) -> tuple[str, ...]:
        """Names of the gains and biases of the norms over the hidden size."""
        others = (*self.head_norms, f"{self.consumer}.bias", self.scale)
        return tuple(name for name, shape in self.shared.items() if len(shape) == 1 and name not in others)

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
            "heads": self.heads(self.size),
            "heads per group": 1 if self.scores else self.members,
            "channels": self.channels,
            "experts": self.units,
            "channels per expert": self.members,
        }
        return {attribute: counted[what] for attribute, what in self.sizes.items()}

    def resized(self, size: Size) -> "Block":
        """Return the block at another size."""
        units, members = size if size.units else GONE
        return replace(self, units=units, members=members)

    def narrowed(self, hidden_size: int) -> "Block":
        """Return the block of a model with another hidden size."""

        def narrow(part: Slice) -> Slice:
            return part if part.hidden_dim is None else replace(part, width=hidden_size)

        shared = {
            name: shape if name in self.head_norms else (*shape[:-1], hidden_size)
            for name, shape in self.shared.items()
        }
        linear = self.linear and (narrow(self.linear[0]), self.linear[1])
        writers = tuple(map(narrow, self.writers))
        return replace(self, reader=narrow(self.reader), writers=writers, linear=linear, shared=shared)


@dataclass(frozen=True)
class Anatomy:
    """A transformer as its blocks and what surrounds them."""

    family: str
    task: TaskName
    layers_path: str
    context: int  # tokens that a row can have, or that every image has
    hidden_size: int
    head_dim: int
    vocabulary: int  # 0 if rows are images
    predicted: int  # tokens of the vocabulary that have a logit; those that only start an image have none
    image: tuple[int, int, int] | None  # channels, height and width if rows are images
    blocks: tuple[Block, ...]  # attention before MLP before experts, first layer first: the order of the forward pass
    # Name -> shape of the tensors that no block owns, tied ones once; a decoder's have the hidden size last.
    around: Mapping[str, tuple[int, ...]]
    output_parameters: int  # of the output matrix, tied or not
    bytes_per_value: int  # of the dtype that the configuration names
    sliding_window: int | None  # of some layers, or of all; None: no layer has one
    attention_differs: bool  # some layers have a sliding window, others full attention
    residual_scale: float  # by which a block's output is multiplied on its way into the residual stream
    numbering_field: str | None  # of the configuration, if layers compute with their index: none can be dropped
    mergings: Mapping[int, str]  # layer -> path of the module that merges tokens before it, if it begins a stage

    @property
    def layers(self) -> int:
        return self.blocks[-1].layer + 1

    def tokens_of(self, row: Sequence[int]) -> int:
        """Return the number of hidden states of a row of this shape: (S,) tokens, or (C, height, width) pixels."""
        return row[0] if self.image is None else self.context

    def stream_of(self, row: Sequence[int], layer: int) -> tuple[int, int]:
        """Return the number of hidden states of a row of this shape in front of a layer, and their size."""
        block = self.of_layer(layer)[0]
        return self.tokens_of(row) if block.stage is None else prod(block.stage.grid), block.hidden_size

    def share_of_tokens(self, block: Block) -> float:
        """Return the tokens that a block reads, relative to those in front of the first layer."""
        return 1.0 if block.stage is None else prod(block.stage.grid) / self.context

    def largest_stream(self, row: Sequence[int]) -> int:
        """Return the values of the hidden states of a row of this shape where they are most."""
        return max(prod(self.stream_of(row, layer)) for layer in range(self.layers))

    def largest_inputs(self, row: Sequence[int]) -> int:
        """Return the most values that a consumer reads of a row of this shape.

        Experts do not count: their inputs are not stored.
        """
        stored = (block for block in self.blocks if block.routing is None)
        return max(self.stream_of(row, block.layer)[0] * block.channels for block in stored)

    @property
    def layer_paths(self) -> tuple[str, ...]:
        """Paths of the layers, first to last."""
        return tuple(blocks[0].path for blocks in self._by_layer)

    def is_in_layers(self, name: str) -> bool:
        """Return whether a tensor of the model is in one of its layers."""
        return name.startswith(self._inside)

    @cached_property
    def _inside(self) -> tuple[str, ...]:
        return tuple(f"{path}." for path in self.layer_paths)

    @property
    def fixed_parameters(self) -> int:
        """Embeddings and the last norm."""
        return sum(prod(shape) for shape in self.around.values())

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Kinds of blocks, in the order of the forward pass."""
        return tuple(dict.fromkeys(block.kind for block in self.blocks))

    @property
    def is_uniform(self) -> bool:
        """Every layer has the same sizes, or those that follow from its stage, so a stock architecture can hold it."""
        sizes = [{(block.units / block.multiple, block.members) for block in blocks} for blocks in self.alike]
        return all(len(found) == 1 for found in sizes) and all(block.units for block in self.blocks)

    @property
    def alike(self) -> tuple[tuple[Block, ...], ...]:
        """Groups of blocks that have one size in a stock architecture (or its multiples), in the order of the pass."""
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

    def window_of(self, block: Block) -> int | None:
        """Return how many tokens a block of attention sees, itself included; None: the whole context."""
        return self.sliding_window if block.sliding or not self.attention_differs else None

    def keeping(self, sizes: Mapping[str, Size]) -> "Anatomy":
        """Return the anatomy with each block at the size `sizes[block.name]`."""
        return replace(self, blocks=beside_what_is_left([block.resized(sizes[block.name]) for block in self.blocks]))

    def without(self, dropped: Collection[int]) -> "Anatomy":
        """Return the anatomy with these layers dropped and the others renumbered."""
        if not dropped:
            return self
        left = enumerate(layers_left(self.layers, dropped))
        blocks = (
            replace(block, layer=new, path=f"{self.layers_path}.{new}")
            for new, old in left
            for block in self.of_layer(old)
        )
        return replace(self, blocks=tuple(blocks))

    def narrowed(self, hidden_size: int) -> "Anatomy":
        """Return the anatomy of a decoder with another hidden size."""
        return replace(
            self,
            hidden_size=hidden_size,
            blocks=tuple(block.narrowed(hidden_size) for block in self.blocks),
            around={name: (*shape[:-1], hidden_size) for name, shape in self.around.items()},
            output_parameters=self.output_parameters // self.hidden_size * hidden_size,
        )

    @property
    def final_gain(self) -> str:
        """Name of the gain of a decoder's last norm."""
        return f"{FAMILIES[self.family].final_norm}.weight"

    @property
    def is_tied(self) -> bool:
        """Return whether a decoder's output matrix is the embedding's."""
        return not any(name in self.around for name in FAMILIES[self.family].untied)

    def untied(self) -> "Anatomy":
        """Return the anatomy of a decoder whose output matrix is not the embedding's."""
        shape = (self.vocabulary, self.hidden_size)
        return replace(self, around={**dict.fromkeys(FAMILIES[self.family].untied, shape), **self.around})

    def stock_holds(self, block: Block, size: Size) -> bool:
        """Return whether a stock configuration can represent a model whose blocks of that kind all have this size."""
        family = FAMILIES[self.family]
        if block.kind == "mlp" and family.ratio is not None:
            return family.ratio_of(size.units, self.hidden_size, gated=block.linear is not None) is not None
        if block.scores and size.members != self.head_dim:
            return False
        heads = block.heads(size)
        if block.kind != "attention" or family.stock_heads == "any" or family.stand_in is not None:
            return True
        if family.stock_heads == "divisors":
            return block.hidden_size % heads == 0
        return heads * self.head_dim == block.hidden_size


def beside_what_is_left(blocks: Sequence[Block]) -> tuple[Block, ...]:
    """Return the blocks; one whose parallel neighbour is removed is no longer `beside` it."""
    alone = {block.name for previous, block in pairwise(blocks) if not previous.units}
    return tuple(replace(block, beside=False) if block.beside and block.name in alone else block for block in blocks)


def by_layer(blocks: tuple[Block, ...]) -> tuple[tuple[Block, ...], ...]:
    """Group a model's blocks, first layer first, by layer."""
    return tuple(tuple(found) for _, found in groupby(blocks, key=lambda block: block.layer))
