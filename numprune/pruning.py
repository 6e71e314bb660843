"""The whole of pruning: calibrate, score, allocate, choose, compensate, cut.

The model is walked once from its first layer to its last (once more before, where the allocation needs every block's
scores or error curve). In each block: moments of the consumer's inputs, scores, the choice of units, the refitted
consumer. With `sequential` and `residual` compensation the inputs come from the already pruned prefix and the targets
from the dense model, both carried side by side. What is left of a layer is handed on as soon as it is finished, so that
neither the model nor the result need be in memory.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from numprune import sensitivity
from numprune.allocation import ALLOCATIONS, by_error, check_ratio, global_sort, keep_highest, uniform
from numprune.anatomy import Anatomy, Block, read_anatomy
from numprune.axes import AXES, DEFAULT_AXES, Limits
from numprune.budget import Budget, measure
from numprune.calibration import Walker, check_rows, consumer_of, consumer_weight
from numprune.compensation import choose_damping, mean_bias, refit
from numprune.corpus import rows_digest
from numprune.criteria import CRITERIA, BlockView, member_scores
from numprune.curves import error_curve
from numprune.errors import InputError
from numprune.inputs import FROM_PRUNED_PREFIX, Collected, Inputs, Walked
from numprune.layers import Layers, ModelLayers
from numprune.moments import Moments
from numprune.plan import BlockPlan, Calibration, Plan, PricedSplit
from numprune.progress import progress
from numprune.sensitivity import Sensitivity
from numprune.slices import Kept, Size
from numprune.splits import priced, splits_meeting
from numprune.surgery import assemble, can_hold_bias, channels_of, cut_layer, pruned_config
from numprune.target import Sizes, Target, allowed_sizes
from numprune.tasks import CAUSAL, Task

logger = logging.getLogger(__name__)

Sink = Callable[[Mapping[str, Tensor]], object]  # takes the tensors that are left of a finished layer, by full name

# `bias` is FLAP's own compensation; it is offered where an architecture can hold a bias. What each is worth stands in
# compensation.py.
COMPENSATIONS = ("none", "bias", "oneshot", "sequential", "residual", "joint")
_REFITTING = ("oneshot", *FROM_PRUNED_PREFIX)
_PRICED_ROWS = 4  # every fourth calibration row: gradients for uniform's prices; those of all rows ranked splits alike


@dataclass(frozen=True)
class PruneOptions:
    """What to remove and how.

    Attributes:
        ratio: share of the prunable parameters to remove.
        criterion: a name of `criteria.CRITERIA`.
        allocation: a name of `allocation.ALLOCATIONS`.
        compensation: one of `COMPENSATIONS`.
        target: what the server of the result needs of its sizes.
        axes, keep, floors, skips: as of `axes.Limits`. The allocation global cannot remove single query heads, and
            uniform no whole block.
        damping: of the least squares, relative to the mean of diag(G); the least that is tried, where the compensation
            takes its inputs from the pruned prefix and the damping is chosen on calibration rows held out.
        seed: of the criteria that draw.
        batch_size: calibration rows at a time; changes memory and speed, not the result beyond rounding.
    """

    ratio: float
    criterion: str = "obs"
    allocation: str = "uniform"
    compensation: str = "joint"
    target: Target = field(default_factory=Target)
    axes: Sequence[str] = DEFAULT_AXES
    keep: Sequence[str] = ()
    floors: Mapping[str, float] = field(default_factory=dict)
    skips: bool = False
    damping: float = 1e-3
    seed: int = 0
    batch_size: int = 8

    @property
    def limits(self) -> Limits:
        return Limits(self.axes, self.keep, self.floors, self.skips)


@dataclass(frozen=True)
class Known:
    """What has been collected of the dense model on the calibration rows, so that it need not be collected again.

    Attributes:
        moments: block name -> of every block that has units.
        sensitivity: where `uses_gradients`, with Taylor scores where they are the criterion.
    """

    moments: Mapping[str, Moments]
    sensitivity: Sensitivity | None = None


@dataclass(frozen=True)
class Pruned:
    model: PreTrainedModel
    plan: Plan
    before: Budget
    after: Budget

    @property
    def prunable_ratio_removed(self) -> float:
        return 1 - self.after.prunable_parameters / self.before.prunable_parameters


def uses_gradients(options: PruneOptions) -> bool:
    """Whether the loss's gradients are used: whether `Known.sensitivity` helps."""
    return options.allocation == "error" or options.criterion == "taylor"


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
        raise InputError(
            "skips: uniform allocation gives every layer the same size, so no block can go; use error or global"
        )
    if options.skips and anatomy.attention_differs:
        raise InputError(
            "skips: a model with sliding windows in some layers only must keep the attention of every layer"
        )
    if options.skips and any(block.post_norms for block in anatomy.blocks):
        raise InputError(
            f"skips: in {anatomy.family} a norm follows each block and would go with it, so what a block is worth does "
            "not follow from its output"
        )
    if options.skips and options.compensation == "bias":
        raise InputError("skips: a block that is gone has no bias to compensate with; use another compensation")
    if options.compensation == "bias" and not can_hold_bias(anatomy.family):
        raise InputError(
            f"compensation bias: the projections of {anatomy.family} cannot hold a bias; use another compensation"
        )
    allowed = _allowed(anatomy, options)
    members = [name for name in options.axes if AXES[name].part == "members"]
    if members and options.allocation == "global":
        raise InputError(
            f"axes: allocation global sorts whole units; leave out {', '.join(members)}, or use allocation error"
        )
    check_ratio(anatomy, options.ratio, allowed)
    if options.allocation == "uniform":
        _check_same_in_every_layer(anatomy, options)
        uniform(anatomy, options.ratio, allowed)


def _check_same_in_every_layer(anatomy: Anatomy, options: PruneOptions) -> None:
    protected = options.limits.protected(anatomy)
    for kind in anatomy.kinds:
        names = [block.name for block in anatomy.of_kind(kind)]
        inside, outside = ([name for name in names if (name in protected) == kept] for kept in (True, False))
        if inside and outside:
            raise InputError(
                f"keep: uniform allocation gives every layer the same size, and {inside[0]} is protected while "
                f"{outside[0]} is not; use allocation error, or keep {kind} everywhere ({kind!r})"
            )


def prune(
    model: PreTrainedModel,
    rows: Tensor,
    options: PruneOptions,
    known: Known | None = None,
    task: Task = CAUSAL,
) -> Pruned:
    """Return `model` pruned; the one passed in is used up.

    Its consumer weights are overwritten with the refitted ones, zero at the removed channels: it then computes what the
    pruned one does (but for the biases that `bias` compensation adds).

    Args:
        model: a supported model in float32, with the attention that its family is walked with.
        rows: (N, S) int64 calibration tokens.
        options: what to remove and how.
        known: of the model on these rows.
        task: that the model is for.

    Raises:
        InputError: unsupported architecture, options that cannot work, rows that are not this model's.
    """
    layers = ModelLayers(model, task)
    cut: dict[str, Tensor] = {}
    plan = prune_layers(layers, rows, options, cut.update, known)
    pruned = assemble(model, config_after(layers, plan), cut)
    return Pruned(pruned, plan, measure(layers.anatomy), measure(read_anatomy(pruned.config)))


def config_after(layers: Layers, plan: Plan) -> PreTrainedConfig:
    """Return the configuration of what `plan` leaves of the model."""
    kept = layers.anatomy.keeping(plan.sizes())
    return pruned_config(layers.config, kept, with_bias=plan.compensation == "bias")


@torch.no_grad()
def prune_layers(layers: Layers, rows: Tensor, options: PruneOptions, sink: Sink, known: Known | None = None) -> Plan:
    """Return the plan; give `sink` the tensors that are left of each decoder layer, first layer first.

    What stands around the layers is not pruned and not given.

    Args:
        layers: of a supported model, computing in float32.
        rows: (N, S) int64 calibration tokens.
        options: what to remove and how.
        sink: may keep the tensors, or not.
        known: as of `prune`.

    Raises:
        InputError: options that cannot work, or rows that are not this model's.
    """
    anatomy = layers.anatomy
    check_options(anatomy, options)
    check_rows(anatomy, rows)
    if options.compensation in _REFITTING:
        _warn_of_few(rows, anatomy)
    walker = Walker(layers, rows.shape[1], options.batch_size)
    gradients = known.sensitivity if known and uses_gradients(options) else None
    if uses_gradients(options) and gradients is None:
        gradients = sensitivity.measure(layers, rows, options.batch_size, taylor=options.criterion == "taylor")
    sizes, splits = _sizes_to_keep(layers, walker, rows, options, known, gradients)
    if options.criterion != "taylor":
        gradients = None  # large, and needed no more
    inputs = (
        Walked(walker, rows, options.compensation)
        if known is None or options.compensation in FROM_PRUNED_PREFIX
        else Collected(known.moments)
    )
    kept: dict[str, Kept] = {}  # by block name
    dampings: dict[str, float | None] = {}  # block name -> of its least squares
    for index in progress(range(anatomy.layers), "prune", "layer"):
        blocks = anatomy.of_layer(index)
        biases: dict[str, Tensor] = {}
        with layers.layer(index) as layer:
            for block in blocks:
                if not block.units:
                    kept[block.name] = Kept.whole(torch.empty(0, dtype=torch.long), block.members)
                    continue
                moments = inputs.moments(layer, block)
                weight = consumer_weight(layer, block).double()
                view = _view(block, weight, moments, options, gradients)
                left = kept[block.name] = _choose(view, sizes[block.name], options.criterion)
                damping = _damping(consumer_of(layer, block), weight, block, left, moments, inputs.held_out, options)
                dampings[block.name] = damping if _is_fitted(block, left, options) else None
                bias = _compensate(layer, weight, block, left, moments, damping, options)
                if bias is not None:
                    biases[block.name] = bias
                inputs.pass_on(layer, block, left, damping)
            sink(cut_layer(layer, blocks, kept, biases))
    return describe(
        anatomy,
        rows,
        options,
        {block.name: BlockPlan.of(block, kept[block.name], dampings.get(block.name)) for block in anatomy.blocks},
        splits,
    )


def _allowed(anatomy: Anatomy, options: PruneOptions) -> Sizes:
    """The sizes that each block may be left with; uniform ones are those that a stock configuration holds."""
    return allowed_sizes(anatomy, options.target, options.limits, stock=options.allocation == "uniform")


def describe(
    anatomy: Anatomy,
    rows: Tensor,
    options: PruneOptions,
    blocks: dict[str, BlockPlan],
    splits: list[PricedSplit] | None = None,
) -> Plan:
    """Return the plan of these blocks and splits; all else that stands in it is known before anything is run."""
    return Plan(
        family=anatomy.family,
        criterion=options.criterion,
        allocation=options.allocation,
        compensation=options.compensation,
        ratio=options.ratio,
        target=options.target,
        axes=list(options.axes),
        keep=list(options.keep),
        floors=dict(options.floors),
        skips=options.skips,
        damping=options.damping,
        seed=options.seed,
        calibration=Calibration(digest=rows_digest(rows), rows=rows.shape[0], sequence_length=rows.shape[1]),
        splits=splits,
        blocks=blocks,
    )


def _warn_of_few(rows: Tensor, anatomy: Anatomy) -> None:
    for kind in anatomy.kinds:
        widest = max(anatomy.of_kind(kind), key=lambda block: block.channels)
        if rows.numel() < 4 * widest.channels:
            logger.warning(
                "%d calibration tokens are fewer than %d, four times the %d channels of %s, the widest %s block: "
                "its least squares will fit noise",
                rows.numel(),
                4 * widest.channels,
                widest.channels,
                widest.name,
                kind,
            )


def dense_moments(layers: Layers, rows: Tensor, batch_size: int = 8) -> Iterator[tuple[str, Moments]]:
    """Yield block name and moments of every block that has units, in the order of the forward pass."""
    walk = Walked(Walker(layers, rows.shape[1], batch_size), rows)
    for index in progress(range(layers.anatomy.layers), "calibrate", "layer"):
        with layers.layer(index) as layer:
            for block in layers.anatomy.of_layer(index):
                if block.units:
                    yield block.name, walk.moments(layer, block)


def _sizes_to_keep(
    layers: Layers,
    walker: Walker,
    rows: Tensor,
    options: PruneOptions,
    known: Known | None,
    gradients: Sensitivity | None,
) -> tuple[dict[str, Size], list[PricedSplit] | None]:
    """Return the size of what to keep by block name, and what `uniform` chose from.

    The dense model is walked for it, unless `uniform` has nothing to choose or no error curve to choose by.
    """
    anatomy, ratio = layers.anatomy, options.ratio
    allowed = _allowed(anatomy, options)
    if options.allocation == "uniform":
        splits = splits_meeting(anatomy, ratio, allowed)
        if len(splits) == 1 or options.compensation not in _REFITTING:  # the curves are those of refitted consumers
            return uniform(anatomy, ratio, allowed), None
        gradients = gradients or sensitivity.measure(layers, rows[::_PRICED_ROWS], options.batch_size)
    inputs = Walked(walker, rows) if known is None else Collected(known.moments)
    if options.allocation == "global":
        scores = dict.fromkeys((block.name for block in anatomy.blocks), torch.empty(0))
        scores |= {
            block.name: CRITERIA[options.criterion](_view(block, weight, moments, options, gradients))
            for block, weight, moments in _dense_blocks(layers, inputs)
        }
        return global_sort(anatomy, ratio, allowed, scores), None
    assert gradients is not None
    errors = dict.fromkeys((block.name for block in anatomy.blocks), torch.zeros(1, 1))
    errors |= {
        block.name: error_curve(
            weight,
            moments.gram,
            gradients.output[block.name],
            block.size,
            members=options.limits.takes(block, "members"),
        )
        for block, weight, moments in _dense_blocks(layers, inputs)
    }
    if options.allocation == "error":
        return by_error(anatomy, ratio, allowed, errors), None
    return uniform(anatomy, ratio, allowed, errors), [
        PricedSplit(
            kv_groups=split.attention.units,
            query_heads=split.attention.members,
            mlp_channels=split.mlp_channels,
            nats_per_token=float(f"{nats:.4g}"),  # further digits depend on the batch size and the machine
        )
        for split, nats in priced(splits, anatomy, errors).items()
    ]


def _dense_blocks(layers: Layers, inputs: Inputs) -> Iterator[tuple[Block, Tensor, Moments]]:
    """Yield every block that has units, its consumer's weight (out, D) in float64, and its moments."""
    for index in progress(range(layers.anatomy.layers), "score", "layer"):
        with layers.layer(index) as layer:
            for block in layers.anatomy.of_layer(index):
                if block.units:
                    yield block, consumer_weight(layer, block).double(), inputs.moments(layer, block)


def _view(
    block: Block, weight: Tensor, moments: Moments, options: PruneOptions, gradients: Sensitivity | None
) -> BlockView:
    kind = 0 if block.kind == "attention" else 1
    return BlockView(
        weight,
        moments.gram,
        moments.mean,
        block.channels_per_unit,
        options.ratio,
        seed=(options.seed * 1_000_003 + 2 * block.layer + kind) % (1 << 63),
        taylor=gradients.taylor[block.name] if gradients and options.criterion == "taylor" else None,
        members=block.members,
    )


def _choose(view: BlockView, size: Size, criterion: str) -> Kept:
    """Return what scores highest: first the units, then of each of them its members."""
    units = keep_highest(CRITERIA[criterion](view), size.units)
    if not size.units or size.members == view.members:
        return Kept.whole(units, view.members)
    scores = member_scores(criterion, view, units)
    return Kept(units, torch.stack([keep_highest(own, size.members) for own in scores]))


def _damping(
    consumer: nn.Linear,
    weight: Tensor,
    block: Block,
    left: Kept,
    moments: Moments,
    held_out: Moments | None,
    options: PruneOptions,
) -> float:
    """The damping of the block's least squares: chosen on the rows held out, where there are any."""
    if held_out is None or not left.size.units:
        return options.damping
    own = None if consumer.bias is None else consumer.bias.double()
    kept = channels_of(block, left)
    held = held_out.of(kept)
    return choose_damping(weight[:, kept], own, moments.of(kept).without(held), held, options.damping)


def _is_fitted(block: Block, left: Kept, options: PruneOptions) -> bool:
    """Whether the block's consumer is fitted: it has lost channels, or makes up for what others lost."""
    loses = left.size != block.size or options.compensation in ("residual", "joint")
    return options.compensation in _REFITTING and loses and left.size.units > 0


def _compensate(
    layer: nn.Module,
    weight: Tensor,
    block: Block,
    left: Kept,
    moments: Moments,
    damping: float,
    options: PruneOptions,
) -> Tensor | None:
    """Overwrite the consumer: zero at the removed channels, refitted at the others where the options ask for it.

    Args:
        layer: the block's.
        weight: (out, D) float64, the consumer's weight.
        left: what is kept of the block.
        damping: of the refit.

    Returns:
        The bias (out,) that `bias` compensation gives it, with what it had; None for every other compensation.
    """
    consumer, stored = consumer_of(layer, block), consumer_weight(layer, block)
    kept = channels_of(block, left)
    columns = weight[:, kept]
    own = None if consumer.bias is None else consumer.bias.double()
    added = mean_bias(weight, own, kept, moments) if options.compensation == "bias" else None
    if _is_fitted(block, left, options):
        columns, bias = refit(weight, own, kept, moments, damping)
        if bias is not None:
            consumer.bias.copy_(bias)
    stored.zero_()
    stored[:, kept] = columns.to(stored.dtype)
    if not left.size.units and consumer.bias is not None:
        consumer.bias.zero_()  # it goes with the block
    return added
