"""The whole of pruning: calibrate, score, allocate, choose, compensate, cut.

The model is walked once from its first layer to its last (once more before, where the allocation needs every block's
scores or error curve). In each block: moments of the consumer's inputs, scores, the choice of units, the refitted
consumer. With `sequential` and `residual` compensation the inputs come from the already pruned prefix and the targets
from the dense model, both carried side by side. What is left of a layer is handed on as soon as it is finished, so that
neither the model nor the result need be in memory.

Whole layers that are to go are chosen before (depth.py). Scores, error curves and inputs are then those of the model
without them; the targets that come from the dense model still have them.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

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
from numprune.depth import Shallower, choose, ratio_left, smallest_layers
from numprune.errors import InputError
from numprune.experts.choice import Scoring, choose_experts, error_table, expert_scores
from numprune.experts.finish import finish_experts
from numprune.experts.inputs import Seen
from numprune.inputs import FROM_PRUNED_PREFIX, Collected, Inputs, Walked
from numprune.layers import CopiedLayers, Layers
from numprune.moments import Moments
from numprune.plans import BlockPlan, Calibration, DroppedLayer, Plan, PricedSplit
from numprune.progress import progress
from numprune.sensitivity import Sensitivity
from numprune.slices import Kept, Size
from numprune.splits import priced, splits_meeting
from numprune.surgery import assemble, can_hold_bias, channels_of, cut_layer, pruned_config
from numprune.target import Sizes, Target, allowed_sizes
from numprune.tasks import CAUSAL, Task

logger = logging.getLogger(__name__)

# A block, its consumer's weight (out, D) in float64 and the moments of what it reads -> what it keeps.
Choice = Callable[[nn.Module, Block, Moments | Seen], Kept]
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
        drop_layers: how many whole layers go; units make up the rest of the ratio.
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
    drop_layers: int = 0
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
        moments: block name -> of every block that has units; None: of none, and always so where layers have experts.
        sensitivity: where `uses_gradients`, with Taylor scores where they are the criterion.
    """

    moments: Mapping[str, Moments] | None
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
    if options.criterion == "frequency" and "experts" not in anatomy.kinds:
        raise InputError(f"criterion frequency ranks experts, and {anatomy.family} has none; use another criterion")
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
    options.limits.check(anatomy)
    members = [name for name in options.axes if AXES[name].part == "members" and AXES[name].kind in anatomy.kinds]
    if members and options.allocation == "global":
        raise InputError(
            f"axes: allocation global sorts whole units; leave out {', '.join(members)}, or use allocation error"
        )
    if options.allocation == "uniform":
        _check_same_in_every_layer(anatomy, options)
    dropped = smallest_layers(anatomy, options.drop_layers, _protected_layers(anatomy, options))
    rest, left = _left(anatomy, options, dropped)
    allowed = _allowed(rest, left)
    try:
        check_ratio(rest, left.ratio, allowed)
        if options.allocation == "uniform":
            uniform(rest, left.ratio, allowed)
    except InputError as error:
        if not dropped:
            raise
        raise InputError(
            f"with drop_layers {len(dropped)} the other layers must lose {left.ratio:.4f} of theirs: {error}"
        ) from None


def _protected_layers(anatomy: Anatomy, options: PruneOptions) -> set[int]:
    """Return the layers with a block that loses nothing: they are not dropped."""
    protected = options.limits.protected(anatomy)
    return {block.layer for block in anatomy.blocks if block.name in protected}


def _left(anatomy: Anatomy, options: PruneOptions, dropped: Sequence[int]) -> tuple[Anatomy, PruneOptions]:
    """Return what is left without these layers, and the options for that: its share of the ratio, its blocks' names."""
    if not dropped:
        return anatomy, options
    rest, protected = anatomy.without(dropped), options.limits.protected(anatomy)
    before = [block.name for block in anatomy.blocks if block.layer not in dropped]
    keep = [block.name for block, name in zip(rest.blocks, before, strict=True) if name in protected]
    ratio = ratio_left(anatomy, options.ratio, dropped)
    return rest, replace(options, ratio=ratio, keep=keep, drop_layers=0)


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
    plan: Plan | None = None,
) -> Pruned:
    """Return `model` pruned; the one passed in stays as it is, and shares with the result what is not cut.

    Args:
        model: a supported model in float32, with the attention that its family is walked with.
        rows: (N, S) int64 calibration tokens.
        options: what to remove and how.
        known: of the model on these rows.
        task: that the model is for.
        plan: as of `prune_layers`.

    Raises:
        InputError: unsupported architecture, options that cannot work, rows that are not this model's.
    """
    layers = CopiedLayers(model, task)
    check_options(layers.anatomy, options)
    dropped = layers_to_drop(layers, rows, options) if plan is None else plan.dropped
    cut: dict[str, Tensor] = {}
    made = prune_layers(layers, rows, options, cut.update, known, dropped, plan)
    pruned = assemble(model, config_after(layers, made), cut)
    return Pruned(pruned, made, measure(layers.anatomy), measure(read_anatomy(pruned.config)))


def layers_to_drop(layers: Layers, rows: Tensor, options: PruneOptions) -> tuple[DroppedLayer, ...]:
    """Return the layers that `options` drop, as of `depth.choose`."""
    protected = _protected_layers(layers.anatomy, options)
    return choose(layers, rows, options.drop_layers, options.ratio, protected, options.batch_size)


def config_after(layers: Layers, plan: Plan) -> PreTrainedConfig:
    """Return the configuration of what `plan` leaves of the model."""
    dropped = plan.dropped_layers()
    kept = layers.anatomy.keeping(plan.sizes()).without(dropped)
    return pruned_config(layers.config, kept, with_bias=plan.compensation == "bias", dropped=dropped)


@torch.no_grad()
def prune_layers(
    layers: Layers,
    rows: Tensor,
    options: PruneOptions,
    sink: Sink,
    known: Known | None = None,
    dropped: Sequence[DroppedLayer] = (),
    plan: Plan | None = None,
) -> Plan:
    """Return the plan; give `sink` the tensors that are left of each decoder layer, first layer first.

    What stands around the layers is not pruned and not given. Tensors have the names of the result, where layers that
    come after a dropped one have lower numbers.

    Args:
        layers: of a supported model, computing in float32.
        rows: (N, S) int64 calibration tokens.
        options: what to remove and how.
        sink: may keep the tensors, or not.
        known: as of `prune`; of no use where layers are dropped.
        dropped: the layers that `depth.choose` gave for these options, or `plan` has.
        plan: says what to keep; nothing is scored then. `check_plan` has passed it, and `options` are `options_of` it.

    Raises:
        InputError: options that cannot work, or rows that are not this model's.
    """
    rest = _rest(layers, rows, options, known, dropped)
    anatomy, options = rest.layers.anatomy, rest.options
    if options.compensation in _REFITTING:
        _warn_of_few(rows, anatomy)
    walker = Walker(rest.layers, rows.shape[1], options.batch_size)
    choice, splits = _choice(rest, walker, rows) if plan is None else (_planned(rest, plan), plan.splits)
    inputs: Inputs = (
        Walked(walker, rows, options.compensation)
        if rest.known is None or rest.known.moments is None or options.compensation in FROM_PRUNED_PREFIX
        else Collected(rest.known.moments)
    )
    whole = Walker(layers, rows.shape[1], options.batch_size)
    kept: dict[str, Kept] = {}  # by block name
    dampings: dict[str, float | None] = {}  # block name -> of its least squares
    index = 0  # in what is left of the model
    for number in progress(range(layers.anatomy.layers), "prune", "layer"):
        if number in rest.gone:
            inputs.drop(whole, number)
            continue
        blocks = anatomy.of_layer(index)
        biases: dict[str, Tensor] = {}
        with rest.layers.layer(index) as layer:
            for block in blocks:
                if not block.units:
                    kept[block.name] = _nothing(block)
                    continue
                if block.routing is not None:
                    assert isinstance(inputs, Walked)
                    left = kept[block.name] = choice(layer, block, inputs.experts(layer, block))
                    gamma = options.damping if _is_fitted(block, left.size, options) else None
                    dampings[block.name] = finish_experts(layer, block, left, inputs, gamma)
                    continue
                moments = inputs.moments(layer, block)
                weight = consumer_weight(layer, block).double()
                left = kept[block.name] = choice(layer, block, moments)
                damping = _damping(consumer_of(layer, block), weight, block, left, moments, inputs.held_out, options)
                dampings[block.name] = damping if _is_fitted(block, left.size, options) else None
                bias = _compensate(layer, weight, block, left, moments, damping, options)
                if bias is not None:
                    biases[block.name] = bias
                inputs.pass_on(layer, block, left, damping)
            sink(cut_layer(layer, blocks, kept, biases))
        index += 1
    return rest.describe(rows, kept, dampings, splits)


@torch.no_grad()
def plan_layers(
    layers: Layers,
    rows: Tensor,
    options: PruneOptions,
    known: Known | None = None,
    dropped: Sequence[DroppedLayer] = (),
) -> Plan:
    """Return a plan without pruning anything, for `prune_layers` to follow.

    Its sizes are those that `prune_layers` comes to by itself. Units are chosen by what the dense model's consumers
    read; `prune_layers` chooses by what the pruned blocks before them give, where the compensation reads that. So some
    of its units can be others.

    The arguments are those of `prune_layers`.
    """
    rest = _rest(layers, rows, options, known, dropped)
    walker = Walker(rest.layers, rows.shape[1], options.batch_size)
    choice, splits = _choice(rest, walker, rows)
    inputs = _dense_inputs(walker, rows, rest.known)
    kept = {block.name: _nothing(block) for block in rest.layers.anatomy.blocks}
    for layer, block in _blocks(rest.layers):
        kept[block.name] = choice(layer, block, _dense_reading(layer, block, inputs))
    return rest.describe(rows, kept, {}, splits)


def known_results(anatomy: Anatomy, options: PruneOptions) -> list[Anatomy]:
    """Return what may be left of the model, as far as its configuration tells.

    One anatomy where nothing is priced, several where `uniform` prices them and takes one, none where each layer gets a
    size of its own, or where there are experts and so too many to list. Which layers are dropped does not matter: under
    `uniform` all are of one size.

    Raises:
        InputError: as `check_options`.
    """
    check_options(anatomy, options)
    if options.allocation != "uniform" or (anatomy.of_kind("experts") and options.compensation in _REFITTING):
        return []
    dropped = smallest_layers(anatomy, options.drop_layers, _protected_layers(anatomy, options))
    rest, left = _left(anatomy, options, dropped)
    if anatomy.of_kind("experts"):
        return [rest.keeping(uniform(rest, left.ratio, _allowed(rest, left)))]
    splits = splits_meeting(rest, left.ratio, _allowed(rest, left))
    if options.compensation not in _REFITTING:
        splits = splits[:1]
    return [rest.keeping(split.sizes(rest)) for split in splits]


def options_of(plan: Plan) -> PruneOptions:
    """Return the options that a plan was made with."""
    return PruneOptions(
        ratio=plan.ratio,
        criterion=plan.criterion,
        allocation=plan.allocation,
        compensation=plan.compensation,
        target=plan.target,
        axes=plan.axes,
        keep=plan.keep,
        floors=plan.floors,
        skips=plan.skips,
        drop_layers=plan.drop_layers,
        damping=plan.damping,
        seed=plan.seed,
    )


@dataclass(frozen=True)
class _Rest:
    """What is left to prune where layers are dropped; the whole model where none is.

    Attributes:
        whole: the model with all its layers.
        layers: without those dropped, renumbered.
        asked: the options as they were given.
        options: for `layers`: the ratio is that of their own parameters.
        known: of `layers`.
        dropped: the layers that are not there.
    """

    whole: Layers
    layers: Layers
    asked: PruneOptions
    options: PruneOptions
    known: Known | None
    dropped: Sequence[DroppedLayer]

    @property
    def gone(self) -> list[int]:
        return [drop.layer for drop in self.dropped]

    def names(self) -> dict[str, str]:
        """Return a block's name here -> in the whole model."""
        before = [block.name for block in self.whole.anatomy.blocks if block.layer not in self.gone]
        return {block.name: name for block, name in zip(self.layers.anatomy.blocks, before, strict=True)}

    def describe(
        self,
        rows: Tensor,
        kept: Mapping[str, Kept],
        dampings: Mapping[str, float | None],
        splits: list[PricedSplit] | None,
    ) -> Plan:
        """Return the plan by the whole model's names; what was kept and fitted is given by those here."""
        blocks = {block.name: BlockPlan.of(block, _nothing(block), None) for block in self.whole.anatomy.blocks}
        names = self.names()
        blocks |= {
            names[block.name]: BlockPlan.of(block, kept[block.name], dampings.get(block.name))
            for block in self.layers.anatomy.blocks
        }
        return describe(self.whole.anatomy, rows, self.asked, blocks, splits, self.dropped)


def _rest(
    layers: Layers, rows: Tensor, options: PruneOptions, known: Known | None, dropped: Sequence[DroppedLayer]
) -> _Rest:
    """Check everything and return what is to be pruned. Raises InputError."""
    if len(dropped) != options.drop_layers:
        raise ValueError(f"{len(dropped)} layers are dropped, where the options say {options.drop_layers}")
    check_options(layers.anatomy, options)
    check_rows(layers.anatomy, rows)
    if known and layers.anatomy.of_kind("experts"):
        known = replace(known, moments=None)  # whoever refits experts must walk
    if not dropped:
        return _Rest(layers, layers, options, options, known, ())
    gone = [drop.layer for drop in dropped]
    _, left = _left(layers.anatomy, options, gone)
    return _Rest(layers, Shallower(layers, gone), options, left, None, dropped)


def _choice(rest: _Rest, walker: Walker, rows: Tensor) -> tuple[Choice, list[PricedSplit] | None]:
    """Return what chooses by the criterion, sizes by the allocation, and what `uniform` chose from."""
    layers, options, known = rest.layers, rest.options, rest.known
    gradients = known.sensitivity if known and uses_gradients(options) else None
    if uses_gradients(options) and gradients is None:
        gradients = sensitivity.measure(layers, rows, options.batch_size, taylor=options.criterion == "taylor")
    by_loss = options.criterion == "obs" and "experts" in layers.anatomy.kinds  # experts are ranked by what it loses
    if gradients is None and by_loss:
        gradients = sensitivity.measure(layers, rows[::_PRICED_ROWS], options.batch_size)
    sizes, splits = _sizes_to_keep(layers, walker, rows, options, known, gradients)
    if options.criterion != "taylor" and not by_loss:
        gradients = None  # large, and needed no more

    def by_score(layer: nn.Module, block: Block, read: Moments | Seen) -> Kept:
        size = sizes[block.name]
        if isinstance(read, Seen):
            return choose_experts(layer, block, size, read, _scoring(block, options, gradients))
        weight = consumer_weight(layer, block).double()
        return _choose(_view(block, weight, read, options, gradients), size, options.criterion)

    return by_score, splits


def _planned(rest: _Rest, plan: Plan) -> Choice:
    """Return what chooses as `plan` says."""
    names = rest.names()
    device = rest.layers.device
    return lambda _layer, block, _read: plan.blocks[names[block.name]].to_kept().to(device)


def _nothing(block: Block) -> Kept:
    return Kept.whole(torch.empty(0, dtype=torch.long), block.members)


def _allowed(anatomy: Anatomy, options: PruneOptions) -> Sizes:
    """The sizes that each block may be left with; uniform ones are those that a stock configuration holds."""
    return allowed_sizes(anatomy, options.target, options.limits, stock=options.allocation == "uniform")


def describe(
    anatomy: Anatomy,
    rows: Tensor,
    options: PruneOptions,
    blocks: dict[str, BlockPlan],
    splits: list[PricedSplit] | None = None,
    dropped: Sequence[DroppedLayer] = (),
) -> Plan:
    """Return the plan of these blocks, splits and layers; what else stands in it is known before anything is run."""
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
        drop_layers=options.drop_layers,
        damping=options.damping,
        seed=options.seed,
        calibration=Calibration(digest=rows_digest(rows), rows=rows.shape[0], sequence_length=rows.shape[1]),
        dropped=list(dropped),
        splits=splits,
        blocks=blocks,
    )


def _warn_of_few(rows: Tensor, anatomy: Anatomy) -> None:
    for kind in (kind for kind in anatomy.kinds if kind != "experts"):
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
    """Yield block name and moments of every block that has units, in the order of the forward pass; not of experts."""
    walk = Walked(Walker(layers, rows.shape[1], batch_size), rows)
    for index in progress(range(layers.anatomy.layers), "calibrate", "layer"):
        with layers.layer(index) as layer:
            for block in layers.anatomy.of_layer(index):
                if block.routing is not None:
                    walk.experts(layer, block)
                    walk.pass_experts_on(layer, block)
                elif block.units:
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
        splits = [] if anatomy.of_kind("experts") else splits_meeting(anatomy, ratio, allowed)
        if len(splits) == 1 or options.compensation not in _REFITTING:  # the curves are those of refitted consumers
            return uniform(anatomy, ratio, allowed), None
        gradients = gradients or sensitivity.measure(layers, rows[::_PRICED_ROWS], options.batch_size)
    inputs = _dense_inputs(walker, rows, known)
    if options.allocation == "global":
        scores = dict.fromkeys((block.name for block in anatomy.blocks), torch.empty(0))
        scores |= {block.name: _ranks(layer, block, inputs, options, gradients) for layer, block in _blocks(layers)}
        return global_sort(anatomy, ratio, allowed, scores), None
    assert gradients is not None
    errors = dict.fromkeys((block.name for block in anatomy.blocks), torch.zeros(1, 1))
    errors |= {
        block.name: _errors(
            layer, block, inputs, gradients.output[block.name], members=options.limits.takes(block, "members")
        )
        for layer, block in _blocks(layers)
    }
    if options.allocation == "error":
        return by_error(anatomy, ratio, allowed, errors), None
    if not splits:
        return uniform(anatomy, ratio, allowed, errors), None
    return uniform(anatomy, ratio, allowed, errors), [
        PricedSplit(
            kv_groups=split.attention.units,
            query_heads=split.attention.members,
            mlp_channels=split.mlp_channels,
            nats_per_token=float(f"{nats:.4g}"),  # further digits depend on the batch size and the machine
        )
        for split, nats in priced(splits, anatomy, errors).items()
    ]


def _blocks(layers: Layers) -> Iterator[tuple[nn.Module, Block]]:
    """Yield every block that has units, with its layer."""
    for index in progress(range(layers.anatomy.layers), "score", "layer"):
        with layers.layer(index) as layer:
            for block in layers.anatomy.of_layer(index):
                if block.units:
                    yield layer, block


def _dense_inputs(walker: Walker, rows: Tensor, known: Known | None) -> Inputs:
    return Walked(walker, rows) if known is None or known.moments is None else Collected(known.moments)


def _dense_reading(layer: nn.Module, block: Block, inputs: Inputs) -> Moments | Seen:
    """What the dense model's block reads."""
    if block.routing is None:
        return inputs.moments(layer, block)
    assert isinstance(inputs, Walked)
    seen = inputs.experts(layer, block)
    inputs.pass_experts_on(layer, block)
    return seen


def _ranks(
    layer: nn.Module, block: Block, inputs: Inputs, options: PruneOptions, gradients: Sensitivity | None
) -> Tensor:
    """The scores of the dense model's block, (units,)."""
    read = _dense_reading(layer, block, inputs)
    if isinstance(read, Seen):
        return expert_scores(layer, block, read, _scoring(block, options, gradients))
    weight = consumer_weight(layer, block).double()
    return CRITERIA[options.criterion](_view(block, weight, read, options, gradients))


def _errors(layer: nn.Module, block: Block, inputs: Inputs, sensitivity: Tensor, *, members: bool) -> Tensor:
    """What each size of the dense model's block costs, (units + 1, members)."""
    read = _dense_reading(layer, block, inputs)
    if isinstance(read, Seen):
        return error_table(layer, block, read, sensitivity)
    weight = consumer_weight(layer, block).double()
    return error_curve(weight, read.gram, sensitivity, block.size, members=members)


def _scoring(block: Block, options: PruneOptions, gradients: Sensitivity | None) -> Scoring:
    kind = 0 if block.kind == "attention" else 1
    return Scoring(
        options.criterion,
        options.ratio,
        seed=(options.seed * 1_000_003 + 2 * block.layer + kind) % (1 << 63),
        taylor=gradients.taylor[block.name] if gradients and options.criterion == "taylor" else None,
        sensitivity=gradients.output[block.name] if gradients and block.routing is not None else None,
    )


def _view(
    block: Block, weight: Tensor, moments: Moments, options: PruneOptions, gradients: Sensitivity | None
) -> BlockView:
    scoring = _scoring(block, options, gradients)
    return BlockView(
        weight,
        moments.gram,
        moments.mean,
        block.channels_per_unit,
        scoring.ratio,
        scoring.seed,
        scoring.taylor,
        block.members,
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


def _is_fitted(block: Block, left: Size, options: PruneOptions) -> bool:
    """Whether the block's consumer is fitted: it has lost channels, or makes up for what others lost."""
    loses = left != block.size or options.compensation in ("residual", "joint")
    return options.compensation in _REFITTING and loses and left.units > 0


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
    if _is_fitted(block, left.size, options):
        columns, bias = refit(weight, own, kept, moments, damping)
        if bias is not None:
            consumer.bias.copy_(bias)
    stored.zero_()
    stored[:, kept] = columns.to(stored.dtype)
    if not left.size.units and consumer.bias is not None:
        consumer.bias.zero_()  # it goes with the block
    return added
