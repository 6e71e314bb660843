"""Gaussian masks on the units of a model's blocks: z = mu + sigma * eps, a number for each KV group, channel or expert.

Query heads, whole blocks and the coordinates of the residual stream (stream.py) may have masks, too. The input of a
block's consumer is multiplied by the masks of the query head, of its KV group and of the block.

A mask multiplies its unit's input to the block's consumer. An expert's mask multiplies its routing weight, so that its
output is scaled and tokens are not rerouted; if the channels of experts have masks, too, the products of both multiply
the channels. With all z = 1, the model is the dense one; with z = 0, it is the model
without the unit (except for the routing of experts).

Notation: K masks of all blocks together and of the residual stream; L leaves of their tree (query heads and channels of
experts if these have masks, otherwise units), then the H coordinates of the stream if these have masks; n rows, S
tokens of a row.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from numprune.blocks import Block
from numprune.calibration import consumer_of, consumer_weight
from numprune.experts.channels import channels_masked
from numprune.experts.inputs import outputs_first
from numprune.layers import replaced
from numprune.learning.stream import Stream, hook_stream
from numprune.slices import Kept

# TVA-Prune starts at a log variance of -9, from which too few units cross the threshold within 150 steps.
_MEAN, _LOG_VARIANCE, _SPREAD = 1.0, -6.0, 0.01
_TINY = 1e-8  # mu^2 has no logarithm at 0


@dataclass(frozen=True)
class Masked:
    """A block whose units have masks.

    Attributes:
        unit: cost of a unit with all its members.
        member: cost of each member.
        by_members: the members have their own masks.
        as_a_whole: the block has one.
    """

    block: Block
    unit: float
    member: float = 0.0
    by_members: bool = False
    as_a_whole: bool = False


class Masks(nn.Module):
    """The masks of some blocks, and of the residual stream.

    Attributes:
        blocks: masked blocks, first layer first.
        stream: if it has masks.
        mean: (K,), mu.
        log_variance: (K,), log sigma^2.
        costs: (K,), cost of a mask alone; for a unit whose members have masks, the cost that they share.
        weights: (K,), `costs` relative to the lowest.
    """

    mean: nn.Parameter
    log_variance: nn.Parameter
    costs: Tensor
    weights: Tensor
    _above: Tensor  # (2, K), the masks above each, K where there is none
    _leaves: Tensor  # (L,)

    def __init__(self, blocks: Sequence[Masked], seed: int, stream: Stream | None = None) -> None:
        super().__init__()
        self.blocks, self.stream = tuple(masked.block for masked in blocks), stream
        trees = [_Tree(masked) for masked in blocks]
        self._width = stream.size if stream else 0
        count = sum(tree.size for tree in trees) + self._width
        firsts = [sum(tree.size for tree in trees[:index]) for index in range(len(trees))]
        self._places = {tree.block.name: (first, tree) for first, tree in zip(firsts, trees, strict=True)}
        above = [
            torch.where(tree.above < 0, count, tree.above + first) for first, tree in zip(firsts, trees, strict=True)
        ]
        above.append(torch.full((2, self._width), count))
        leaves = [tree.leaves + first for first, tree in zip(firsts, trees, strict=True)]
        self._counts = [len(found) for found in leaves]
        leaves.append(torch.arange(count - self._width, count))
        costs = self.spread({masked.block.name: (masked.unit, masked.member) for masked in blocks})
        if stream:
            costs[count - self._width :] = stream.cost
        draw = torch.Generator().manual_seed(seed)
        mean, log_variance = _SPREAD * torch.randn(2, count, generator=draw)
        self.mean = nn.Parameter(mean + _MEAN)
        self.log_variance = nn.Parameter(log_variance + _LOG_VARIANCE)
        self.register_buffer("costs", costs)
        self.register_buffer("weights", costs / costs[costs > 0].min())
        self.register_buffer("_above", torch.cat(above, 1))
        self.register_buffer("_leaves", torch.cat(leaves))

    def spread(self, costs: Mapping[str, tuple[float, float]]) -> Tensor:
        """Return (K,) for the costs of a unit and of a member by block name, as in `costs`; 0 for the stream."""
        parts = [tree.spread(*costs[name]) for name, (_, tree) in self._places.items()]
        return torch.cat([*parts, torch.zeros(self._width)])

    def of_stream(self, values: Tensor) -> Tensor:
        """Return values (…, K) or (…, L) of the residual stream, (…, H)."""
        return values[..., values.shape[-1] - self._width :]

    @property
    def leaves(self) -> int:
        """Return L."""
        return len(self._leaves)

    @property
    def log_alpha(self) -> Tensor:
        """Return log(sigma^2 / mu^2), (K,): a mask below 0 carries more signal than noise."""
        return self.log_variance - (self.mean.square() + _TINY).log()

    @property
    def information(self) -> Tensor:
        """Return 1/2 log(1 + mu^2 / sigma^2), (K,): nats, the KL term of the variational information bottleneck.

        It is KL(N(mu, sigma^2) || N(0, v)) at the prior variance v = mu^2 + sigma^2 that minimizes it (Dai et al., ICML
        2018, eq. 9).
        """
        return nn.functional.softplus(-self.log_alpha) / 2

    def along(self, values: Tensor) -> Tensor:
        """Return the product of the values (…, K) of each mask and of those above it."""
        padded = torch.cat([values, torch.ones_like(values[..., :1])], -1)
        return values * padded[..., self._above[0]] * padded[..., self._above[1]]

    def at_leaves(self, values: Tensor) -> Tensor:
        """Return the factors (…, L) of the leaves for mask values (…, K)."""
        return self.along(values)[..., self._leaves]

    def sample(self, rows: int, draw: torch.Generator) -> Tensor:
        """Return the factors (n, L) of the leaves, drawn separately for each row; `draw`: on the CPU."""
        noise = torch.randn(rows, len(self.mean), generator=draw).to(self.mean)
        return self.at_leaves(self.mean + (self.log_variance / 2).exp() * noise)

    def prices(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the information of each block's units, by block name: of units alone (units,), and of their members.

        The latter (units, members) are 0 if members have no masks. A mask counts `weights` times its information, or
        that of a mask above it if smaller, because that limits what passes.
        """
        padded = torch.cat([self.information, self.information.new_full((1,), torch.inf)])
        price = self.weights * torch.minimum(self.information, padded[self._above].amin(0))
        found = {}
        for name, (first, tree) in self._places.items():
            block, own = tree.block, price[first : first + tree.block.units]
            of_members = own.new_zeros(block.units, block.members)
            if tree.by_members:
                of_members = price[first + block.units :][: block.units * block.members].view_as(of_members)
            found[name] = own, of_members
        return found

    def stream_prices(self) -> Tensor:
        """Return `weights` times the information of the residual stream's coordinates, (H,)."""
        return self.of_stream(self.weights * self.information)

    def indicator(self, kept: Mapping[str, Kept], coordinates: Tensor | None = None) -> Tensor:
        """Return (L,): 1 for kept leaves, 0 for all others.

        Args:
            kept: by block name.
            coordinates: of the residual stream that are kept, if it has masks.
        """
        parts = []
        for block, count in zip(self.blocks, self._counts, strict=True):
            left = kept[block.name]
            members = torch.zeros(block.units, block.members)
            members[left.units[:, None], left.members] = 1
            parts.append(members.flatten() if count > block.units else members.amax(1))
        if coordinates is not None:
            parts.append(torch.zeros(self._width).index_fill(0, coordinates, 1))
        return torch.cat(parts).to(self.mean.device)

    def by_block(self, values: Tensor) -> dict[str, Tensor]:
        """Return values (…, L) by block name, (…, leaves) each."""
        parts = values[..., : sum(self._counts)].split(self._counts, -1)
        return {block.name: part for block, part in zip(self.blocks, parts, strict=True)}


class _Tree:
    """The masks of a block: of its units, of their members, and of the block, in this order.

    Attributes:
        above: (2, size), the two masks above each mask; -1: none.
        leaves: masks with nothing below.
    """

    def __init__(self, masked: Masked) -> None:
        block = self.block = masked.block
        self.by_members = masked.by_members
        units, members = block.units, block.units * block.members if masked.by_members else 0
        self.size = units + members + masked.as_a_whole
        top = units + members if masked.as_a_whole else -1
        self.above = torch.full((2, self.size), -1)
        self.above[0, :units] = top
        self.above[0, units : units + members] = torch.arange(units).repeat_interleave(block.members)[:members]
        self.above[1, units : units + members] = top
        self.leaves = torch.arange(units, units + members) if masked.by_members else torch.arange(units)

    def spread(self, unit: float, member: float) -> Tensor:
        """Return (size,) for the costs of a unit with all its members and of a member, as in `Masks.costs`."""
        block, costs = self.block, torch.zeros(self.size)
        costs[: block.units] = unit - (block.members * member if self.by_members else 0.0)
        if self.by_members:
            costs[block.units :][: block.units * block.members] = member
        return costs


@contextmanager
def masked(layers: Sequence[nn.Module], masks: Masks, values: Tensor) -> Iterator[None]:
    """Run the model of these decoder layers with its leaves multiplied by (n, L), or (1, L) for all rows."""
    with ExitStack() as stack:
        for block, part in zip(masks.blocks, masks.by_block(values).values(), strict=True):
            layer = layers[block.layer]
            if block.routing is not None and part.shape[-1] > block.units:
                stack.enter_context(replaced([consumer_of(layer, block)], channels_masked(layer, block, part)))
            else:
                hook = consumer_of(layer, block).register_forward_pre_hook(multiplier(block, part))
                stack.callback(hook.remove)
        if masks.stream is not None:
            for hook in hook_stream(layers, masks.stream, masks.of_stream(values)):
                stack.callback(hook.remove)
        yield


def multiplier(block: Block, values: Tensor) -> Any:
    """Return a forward pre-hook that multiplies the inputs of the block's consumer by (n, leaves); of experts, (n, E).

    Where n is 1, all rows share the masks. Each forward pass reads `values` anew, so they may be changed in place, and
    may be a leaf of autograd that collects gradients over many passes.
    """
    if block.routing is not None:

        def route(_: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
            hidden, experts, weights = args  # (n * S, H), (n * S, k), (n * S, k)
            of_token = values.repeat_interleave(len(hidden) // len(values), 0)
            return hidden, experts, weights * of_token.gather(1, experts).to(weights)

        return route

    def scale(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        channels = values.repeat_interleave(block.channels // values.shape[-1], -1)
        by_row = args[0].reshape(len(channels), -1, channels.shape[1])  # some models flatten rows
        return ((by_row * channels[:, None].to(by_row)).view_as(args[0]),)

    return scale


@torch.no_grad()
def fold(layers: Sequence[nn.Module], masks: Masks, values: Tensor) -> None:
    """Fold (L,) into the consumers' weights: the model then computes the same without masks of blocks."""
    parts = masks.by_block(values)
    for block in masks.blocks:
        fold_block(layers[block.layer], block, parts[block.name])


@torch.no_grad()
def fold_block(layer: nn.Module, block: Block, values: Tensor) -> None:
    """Multiply (leaves,) of one block into its consumer's weight."""
    if block.routing is None:
        consumer_weight(layer, block).mul_(values.repeat_interleave(block.channels // len(values)))
        return
    if len(values) > block.units:
        down = outputs_first(layer.get_parameter(block.reader.tensor), block.reader.dim == 2)  # (E, H, I)
        down.mul_(values.view(block.units, 1, block.members))
        return
    bias = f"{block.reader.tensor}_bias"
    for name in (block.reader.tensor, *(writer.tensor for writer in block.writers if writer.tensor == bias)):
        weight = layer.get_parameter(name)
        weight.mul_(values.view(-1, *[1] * (weight.dim() - 1)))
