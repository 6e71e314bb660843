"""Fit one block's consumer to what is kept of its inputs, by the options of pruning."""

import logging

from torch import Tensor, nn

from numprune.blocks import Anatomy, Block
from numprune.calibration import consumer_of, consumer_weight
from numprune.compensation import choose_damping, mean_bias, refit
from numprune.moments import Moments
from numprune.options import REFITTING, PruneOptions
from numprune.slices import Kept, Size
from numprune.surgery import channels_of

logger = logging.getLogger(__name__)


def warn_of_few(rows: Tensor, anatomy: Anatomy) -> None:
    """Warn of calibration rows (N, S) with too few tokens for the widest least squares of a kind of block."""
    for kind in (kind for kind in anatomy.kinds if kind != "experts"):
        widest = max(anatomy.of_kind(kind), key=lambda block: block.channels)
        tokens = len(rows) * anatomy.stream_of(rows.shape[1:], widest.layer)[0]
        if tokens < 4 * widest.channels:
            logger.warning(
                "%d calibration tokens are fewer than %d, four times the %d channels of %s, the widest %s block: its "
                "least squares will fit noise",
                tokens,
                4 * widest.channels,
                widest.channels,
                widest.name,
                kind,
            )


def consumer_damping(
    consumer: nn.Linear,
    weight: Tensor,
    block: Block,
    left: Kept,
    moments: Moments,
    held_out: Moments | None,
    options: PruneOptions,
) -> float:
    """Return the damping of the block's least squares, chosen on the held-out rows if there are any."""
    if held_out is None or not left.size.units:
        return options.damping
    own = None if consumer.bias is None else consumer.bias.double()
    kept = channels_of(block, left)
    held = held_out.of(kept)
    return choose_damping(weight[:, kept], own, moments.of(kept).without(held), held, options.damping)


def is_fitted(block: Block, left: Size, options: PruneOptions) -> bool:
    """Return whether the block's consumer is fitted: it lost channels, or compensates for other blocks."""
    loses = left != block.size or options.compensation in ("residual", "joint")
    return options.compensation in REFITTING and loses and left.units > 0


def compensate(
    layer: nn.Module,
    weight: Tensor,
    block: Block,
    left: Kept,
    moments: Moments,
    damping: float,
    options: PruneOptions,
) -> Tensor | None:
    """Overwrite the consumer: zero at the removed channels, and refitted at the others if the options say so.

    Args:
        layer: the block's.
        weight: (out, D) float64, the consumer's weight.
        left: what is kept of the block.
        damping: of the refit.

    Returns:
        The new bias (out,) of `bias` compensation, including the old one; None for every other compensation.
    """
    consumer, stored = consumer_of(layer, block), consumer_weight(layer, block)
    kept = channels_of(block, left)
    columns = weight[:, kept]
    own = None if consumer.bias is None else consumer.bias.double()
    added = mean_bias(weight, own, kept, moments) if options.compensation == "bias" else None
    if is_fitted(block, left.size, options):
        columns, bias = refit(weight, own, kept, moments, damping)
        if bias is not None:
            consumer.bias.copy_(bias)
    stored.zero_()
    stored[:, kept] = columns.to(stored.dtype)
    if not left.size.units and consumer.bias is not None:
        consumer.bias.zero_()  # it goes with the block
    return added
