"""The weights that a block has at a size, computed from its Gram matrix when they are needed."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from numprune.blocks import Block
from numprune.calibration import consumer_of, consumer_weight
from numprune.compensation import refit
from numprune.moments import Moments
from numprune.slices import Kept, Size
from numprune.surgery import channels_of

# Of a consumer: its weight (out, D), zero in the removed channels, and its bias (out,) if it has one.
Level = tuple[Tensor, ...]


class Levels:
    """Refitted consumers of blocks at any size, from the dense model's inputs (`oneshot`).

    Only the levels of the plans that were measured last are stored; computing one takes a Cholesky factorization.

    Args:
        choice: a layer, its block and a size -> what is kept of the block.
        moments: block name -> of the dense model's block.
        damping: of the least squares.
    """

    def __init__(
        self,
        choice: Callable[[nn.Module, Block, Size], Kept],
        moments: Mapping[str, Moments],
        damping: float,
    ) -> None:
        self._choice, self._moments, self._damping = choice, moments, damping
        self._levels: dict[tuple[str, Size], Level] = {}

    def keep(self, plans: Sequence[Mapping[str, Size]]) -> None:
        """Forget the levels of other plans."""
        used = {pair for plan in plans for pair in plan.items()}
        self._levels = {pair: level for pair, level in self._levels.items() if pair in used}

    @contextmanager
    def written(self, layer: nn.Module, blocks: Sequence[Block], plan: Mapping[str, Size]) -> Iterator[None]:
        """Have the blocks of a dense layer compute what they would at the sizes of the plan."""
        cut = [block for block in blocks if block.units and plan[block.name] != block.size]
        levels = [self._level(layer, block, plan[block.name]) for block in cut]
        before = [(value, value.clone()) for block in cut for value in _consumer(layer, block)]
        try:
            for block, level in zip(cut, levels, strict=True):
                for value, new in zip(_consumer(layer, block), level, strict=True):
                    value.copy_(new)
            yield
        finally:
            for value, old in before:
                value.copy_(old)

    def _level(self, layer: nn.Module, block: Block, size: Size) -> Level:
        found = self._levels.get((block.name, size))
        if found is None:
            found = self._levels[block.name, size] = self._fitted(layer, block, size)
        return found

    def _fitted(self, layer: nn.Module, block: Block, size: Size) -> Level:
        stored, *biases = _consumer(layer, block)
        weight = torch.zeros_like(stored)
        if not size.units:
            return weight, *(torch.zeros_like(bias) for bias in biases)
        kept = channels_of(block, self._choice(layer, block, size))
        own = biases[0].double() if biases else None
        columns, bias = refit(stored.double(), own, kept, self._moments[block.name], self._damping)
        weight[:, kept] = columns.to(weight.dtype)
        return (weight,) if bias is None else (weight, bias.to(weight.dtype))


def _consumer(layer: nn.Module, block: Block) -> list[Tensor]:
    """Return the consumer's weight (out, D) and, if it has one, its bias."""
    bias = consumer_of(layer, block).bias
    return [consumer_weight(layer, block), *([] if bias is None else [bias])]
