"""Gaussian masks on the units of a model's blocks: z = mu + sigma * eps, a number for each KV group, channel or expert.

A mask multiplies what its unit hands to the block's consumer; an expert's multiplies its routing weight, so that what
it puts out is scaled and nothing is routed anew. With every z = 1 the model is the dense one, with z = 0 it is the
model without the unit (but for the routing of experts).

Notation: U units of all masked blocks together, n rows, S tokens of a row.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from numprune.blocks import Block
from numprune.calibration import consumer_of, consumer_weight
from numprune.slices import Kept

# TVA-Prune starts at a log variance of -9; from there 150 steps get too few units across the threshold.
_MEAN, _LOG_VARIANCE, _SPREAD = 1.0, -6.0, 0.01
_TINY = 1e-8  # mu^2 has no logarithm at 0


class Masks(nn.Module):
    """The masks of some blocks.

    Attributes:
        blocks: that are masked, first layer first.
        mean: (U,), mu.
        log_variance: (U,), log sigma^2.
        weights: (U,), what a unit costs in parameters relative to the cheapest one.
    """

    mean: nn.Parameter
    log_variance: nn.Parameter
    weights: Tensor

    def __init__(self, blocks: Sequence[Block], seed: int) -> None:
        super().__init__()
        self.blocks = tuple(blocks)
        costs = [torch.full((block.units,), float(block.parameters_per_unit)) for block in self.blocks]
        weights = torch.cat(costs)
        draw = torch.Generator().manual_seed(seed)
        mean, log_variance = _SPREAD * torch.randn(2, len(weights), generator=draw)
        self.mean = nn.Parameter(mean + _MEAN)
        self.log_variance = nn.Parameter(log_variance + _LOG_VARIANCE)
        self.register_buffer("weights", weights / weights.min())

    @property
    def log_alpha(self) -> Tensor:
        """Return log(sigma^2 / mu^2), (U,): a unit below 0 carries more signal than noise."""
        return self.log_variance - (self.mean.square() + _TINY).log()

    @property
    def information(self) -> Tensor:
        """Return 1/2 log(1 + mu^2 / sigma^2), (U,): nats, the KL term of the variational information bottleneck.

        It is KL(N(mu, sigma^2) || N(0, v)) at the prior variance v = mu^2 + sigma^2 that makes it least (Dai et al.,
        ICML 2018, eq. 9).
        """
        return nn.functional.softplus(-self.log_alpha) / 2

    def sample(self, rows: int, draw: torch.Generator) -> Tensor:
        """Return masks (n, U), of each row its own; `draw`: on the CPU."""
        noise = torch.randn(rows, len(self.mean), generator=draw).to(self.mean)
        return self.mean + (self.log_variance / 2).exp() * noise

    def indicator(self, kept: Mapping[str, Kept]) -> Tensor:
        """Return (U,): 1 for the units that are kept of their blocks, by their names, and 0 for the others."""
        parts = [torch.zeros(block.units).index_fill(0, kept[block.name].units, 1.0) for block in self.blocks]
        return torch.cat(parts).to(self.mean.device)

    def by_block(self, values: Tensor) -> dict[str, Tensor]:
        """Return values (…, U) by the name of their block, (…, units) each."""
        parts = values.split([block.units for block in self.blocks], -1)
        return {block.name: part for block, part in zip(self.blocks, parts, strict=True)}


@contextmanager
def masked(layers: Sequence[nn.Module], masks: Masks, values: Tensor) -> Iterator[None]:
    """Have the model whose decoder layers these are run with masks of `values` (n, U), or (1, U): of all rows."""
    parts = masks.by_block(values)
    hooks = [
        consumer_of(layers[block.layer], block).register_forward_pre_hook(_multiply(block, parts[block.name]))
        for block in masks.blocks
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _multiply(block: Block, values: Tensor) -> Any:
    """Return what multiplies the inputs of the block's consumer by its masks (n, units)."""
    if block.routing is not None:

        def route(_: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
            hidden, experts, weights = args  # (n * S, H), (n * S, k), (n * S, k)
            of_token = values.repeat_interleave(len(hidden) // len(values), 0)
            return hidden, experts, weights * of_token.gather(1, experts).to(weights)

        return route
    channels = values.repeat_interleave(block.channels_per_unit, -1)

    def scale(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        by_row = args[0].reshape(len(channels), -1, channels.shape[1])  # some models flatten rows
        return ((by_row * channels[:, None].to(by_row)).view_as(args[0]),)

    return scale


@torch.no_grad()
def fold(layers: Sequence[nn.Module], masks: Masks, values: Tensor) -> None:
    """Multiply masks (U,) into the consumers' weights: the model then computes without them what it did with them."""
    parts = masks.by_block(values)
    for block in masks.blocks:
        layer, part = layers[block.layer], parts[block.name]
        if block.routing is None:
            consumer_weight(layer, block).mul_(part.repeat_interleave(block.channels_per_unit))
            continue
        bias = f"{block.reader.tensor}_bias"
        for name in (block.reader.tensor, *(writer.tensor for writer in block.writers if writer.tensor == bias)):
            weight = layer.get_parameter(name)
            weight.mul_(part.view(-1, *[1] * (weight.dim() - 1)))
