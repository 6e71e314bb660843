"""The whole of pruning: calibrate, score, allocate, choose, compensate, cut.

The model is walked once from its first block to its last (once more before, where the allocation needs every block's
scores). In each block: moments of the consumer's inputs, scores, the choice of units, the refitted consumer. With
`sequential` compensation the inputs come from the already pruned prefix and the targets from the dense model, both
carried side by side.
"""

import logging
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from numprune.allocation import ALLOCATIONS, check_ratio, global_sort, keep_highest, uniform
from numprune.anatomy import Anatomy, Block, read_anatomy
from numprune.budget import Budget, measure
from numprune.calibration import Walker, check_rows
from numprune.compensation import mean_bias, refit
from numprune.corpus import rows_digest
from numprune.criteria import CRITERIA, BlockView
from numprune.errors import InputError
from numprune.plan import BlockPlan, Calibration, Plan
from numprune.statistics import Moments
from numprune.surgery import channels_of, slice_model
from numprune.target import Target, allowed_counts

logger = logging.getLogger(__name__)

# `bias` is FLAP's own compensation; it is offered where an architecture can hold a bias.
COMPENSATIONS = ("none", "bias", "oneshot", "sequential")


@dataclass(frozen=True)
class PruneOptions:
    """What to remove and how.

    Attributes:
        ratio: share of the prunable parameters to remove.
        criterion: a name of `criteria.CRITERIA`.
        allocation: a name of `allocation.ALLOCATIONS`.
        compensation: one of `COMPENSATIONS`.
        target: what the server of the result needs of its sizes.
        skips: whole blocks may go, where the allocation gives each its own size.
        damping: of the least squares, relative to the mean of diag(G).
        seed: of the criteria that draw.
        batch_size: calibration rows at a time; changes memory and speed, not the result beyond rounding.
    """

    ratio: float
    criterion: str = "numerical"
    allocation: str = "uniform"
    compensation: str = "sequential"
    target: Target = field(default_factory=Target)
    skips: bool = False
    damping: float = 1e-3
    seed: int = 0
    batch_size: int = 8


@dataclass(frozen=True)
class Pruned:
    model: PreTrainedModel
    plan: Plan
    before: Budget
    after: Budget

    @property
    def prunable_ratio_removed(self) -> float:
        return 1 - self.after.prunable_parameters / self.before.prunable_parameters


def check_options(anatomy: Anatomy, options: PruneOptions) -> None:
    """Refuse what cannot work before anything is run.

    Raises:
        InputError: an unknown name, a ratio out of reach, or values that make no sense together.
    """
    for option, value, known in (
        ("criterion", options.criterion, tuple(CRITERIA)),
        ("allocation", options.allocation, tuple(ALLOCATIONS)),
        ("compensation", options.compensation, COMPENSATIONS),
    ):
        if value not in known:
            raise InputError(f"{option} is {value!r}; it must be one of {', '.join(known)}")
    if not 0 <= options.damping < float("inf"):
        raise InputError(f"damping is {options.damping}; it must be 0 or more")
    if options.batch_size < 1:
        raise InputError(f"batch_size is {options.batch_size}; it must be at least 1")
    if options.skips and options.allocation == "uniform":
        raise InputError("skips: uniform allocation gives every layer the same size, so no block can go; use global")
    if options.skips and anatomy.attention_differs:
        raise InputError(
            "skips: a model with sliding windows in some layers only must keep the attention of every layer"
        )
    if options.skips and options.compensation == "bias":
        raise InputError("skips: a block that is gone has no bias to compensate with; use another compensation")
    allowed = allowed_counts(anatomy, options.target, skips=options.skips)
    check_ratio(anatomy, options.ratio, allowed)
    if options.allocation == "uniform":
        uniform(anatomy, options.ratio, allowed)


def prune(model: PreTrainedModel, rows: Tensor, options: PruneOptions) -> Pruned:
    """Return `model` pruned; the one passed in is used up (its consumer weights are overwritten).

    Args:
        model: a supported model in float32, with attention "sdpa".
        rows: (N, S) int64 calibration tokens.
        options: what to remove and how.

    Raises:
        InputError: unsupported architecture, options that cannot work, rows that are not this model's.
    """
    plan, biases = prune_in_place(model, rows, options)
    before = measure(read_anatomy(model.config))
    pruned = slice_model(model, plan, biases)
    return Pruned(pruned, plan, before, measure(read_anatomy(pruned.config)))


@torch.no_grad()
def prune_in_place(
    model: PreTrainedModel, rows: Tensor, options: PruneOptions
) -> tuple[Plan, dict[str, Tensor] | None]:
    """Overwrite the consumers with refitted weights, zero at the removed channels, and return the plan.

    Until it is cut, `model` then computes exactly what the cut model will (plus the biases returned, if any).
    """
    anatomy = read_anatomy(model.config)
    check_options(anatomy, options)
    check_rows(model, anatomy, rows)
    widest = max(block.channels for block in anatomy.blocks)
    if rows.numel() < 4 * widest:
        logger.warning(
            "%d calibration tokens are fewer than four times the widest block's %d channels; "
            "the least squares will fit noise",
            rows.numel(),
            widest,
        )
    walker = Walker(model, rows.shape[1], options.batch_size)
    allowed = allowed_counts(anatomy, options.target, skips=options.skips)
    if options.allocation == "global":
        scores = _dense_scores(walker, anatomy, rows, options)
        counts = global_sort(anatomy, options.ratio, allowed, scores)
    else:
        counts = uniform(anatomy, options.ratio, allowed)

    dense = walker.embed(rows)
    pruned = dense.clone() if options.compensation == "sequential" else dense
    blocks: dict[str, BlockPlan] = {}
    biases: dict[str, Tensor] = {}
    for block in tqdm(anatomy.blocks, desc="prune", unit="block", disable=None, leave=False):
        if not block.units:
            blocks[block.name] = BlockPlan(units=0, kept=[])
            continue
        consumer = walker.consumer(block)
        moments = _collect(walker, block, dense, pruned)
        weight = consumer.weight.double()
        units = keep_highest(_scores(block, weight, moments, options), counts[block.name])
        kept = channels_of(block, units)
        blocks[block.name] = BlockPlan(units=block.units, kept=units.tolist())
        bias: Tensor | None = None if consumer.bias is None else consumer.bias.double()
        columns = weight[:, kept]
        if options.compensation == "bias":
            biases[block.name] = mean_bias(weight, bias, kept, moments)
        elif options.compensation != "none" and 0 < len(units) < block.units:
            columns, bias = refit(weight, bias, kept, moments, options.damping)
            if bias is not None:
                consumer.bias.copy_(bias)
        consumer.weight.zero_()
        consumer.weight[:, kept] = columns.to(consumer.weight.dtype)
        if not len(units) and consumer.bias is not None:
            consumer.bias.zero_()  # it goes with the block
        if pruned is not dense:
            walker.advance(block, pruned)
    plan = Plan(
        family=anatomy.family,
        criterion=options.criterion,
        allocation=options.allocation,
        compensation=options.compensation,
        ratio=options.ratio,
        target=options.target,
        skips=options.skips,
        damping=options.damping,
        seed=options.seed,
        calibration=Calibration(digest=rows_digest(rows), rows=rows.shape[0], sequence_length=rows.shape[1]),
        blocks=blocks,
    )
    return plan, biases or None


def _collect(walker: Walker, block: Block, dense: Tensor, pruned: Tensor) -> Moments:
    """Return the moments of the block's inputs in the pruned prefix, dense outputs as targets; advance `dense`."""
    moments = Moments(block.channels, outputs=dense.shape[-1], device=dense.device)
    if pruned is dense:
        for index, inputs, output in walker.run(block, dense):
            moments.add(inputs, output)
            dense[index] += output
    else:
        both = zip(walker.run(block, dense), walker.run(block, pruned), strict=True)
        for (index, _, output), (_, inputs, _) in both:
            moments.add(inputs, output)
            dense[index] += output
    return moments


def _dense_scores(walker: Walker, anatomy: Anatomy, rows: Tensor, options: PruneOptions) -> dict[str, Tensor]:
    hidden = walker.embed(rows)
    scores = {}
    for block in tqdm(anatomy.blocks, desc="score", unit="block", disable=None, leave=False):
        if not block.units:
            scores[block.name] = torch.empty(0)
            continue
        moments = _collect(walker, block, hidden, hidden)
        scores[block.name] = _scores(block, walker.consumer(block).weight.double(), moments, options)
    return scores


def _scores(block: Block, weight: Tensor, moments: Moments, options: PruneOptions) -> Tensor:
    kind = 0 if block.kind == "attention" else 1
    seed = (options.seed * 1_000_003 + 2 * block.layer + kind) % (1 << 63)
    view = BlockView(weight, moments.gram, moments.mean, block.channels_per_unit, options.ratio, seed)
    return CRITERIA[options.criterion](view)
