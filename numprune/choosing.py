"""Choose what to keep: sizes by the allocation, units and members by the criterion, or everything by a plan."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from numprune import sensitivity
from numprune.allocation import by_error, global_sort, keep_highest, uniform
from numprune.blocks import Anatomy, Block
from numprune.budgeted import by_budgets, sizes_within
from numprune.byte_budget import SchemeName
from numprune.calibration import Walker, consumer_weight
from numprune.criteria import CRITERIA, BlockView, member_scores
from numprune.criteria.dimap import importances
from numprune.curves import Errors, error_curve
from numprune.divided import Divided
from numprune.experts.choice import Scoring, choose_experts, error_table, expert_scores
from numprune.experts.inputs import Seen
from numprune.inputs import Inputs, PrecomputedInputs, PropagatedInputs
from numprune.layers import Layers
from numprune.moments import Moments
from numprune.options import REFITTING, PruneOptions, left_of, sizes_allowed, uses_gradients
from numprune.plans import Plan, Price, PricedSplit
from numprune.progress import progress
from numprune.quantization.allocation import Form, levels_of
from numprune.quantization.pricing import rounding_prices
from numprune.refinement import Refinement
from numprune.search.levels import Levels
from numprune.search.refine import refined
from numprune.search.space import Space, cost_and_limit
from numprune.sensitivity import Sensitivity
from numprune.slices import Kept, Size
from numprune.splits import Split, fewest_units, priced, splits_meeting
from numprune.target import Sizes, dims_of_scores

# A layer, its block and the inputs of the block's consumer -> what is kept of the block.
Choice = Callable[[nn.Module, Block, Moments | Seen], Kept]

_PRICED_ROWS = 4  # every fourth calibration row for uniform's gradients; all rows ranked splits the same


@dataclass(frozen=True)
class Known:
    """Data already collected from the dense model on the calibration rows.

    Attributes:
        moments: block name -> moments of every block that has units; None if not collected, always for experts.
        sensitivity: if `uses_gradients`, with Taylor scores if they are the criterion.
        forms: block name -> size and scheme of every block, if something other than the allocation chose them.
    """

    moments: Mapping[str, Moments] | None
    sensitivity: Sensitivity | None = None
    forms: Mapping[str, Form] | None = None


@dataclass(frozen=True)
class Chosen:
    """What is kept of every block.

    Attributes:
        choice: returns what is kept of a block: its size by the allocation, its units and members by the criterion.
        size: returns its size alone.
        splits: that `uniform` chose from.
        schemes: block name -> quantization scheme, as chosen by a budget.
        refinement: of the sizes, by search.
        price: of what budgets chose.
    """

    choice: Choice
    size: Callable[[Block], Size]
    splits: list[PricedSplit] | None = None
    schemes: Mapping[str, SchemeName] = field(default_factory=dict)
    refinement: Refinement | None = None
    price: Price | None = None


def chooser(walker: Walker, rows: Tensor, options: PruneOptions, known: Known | None) -> Chosen:
    """Return a choice of sizes by the allocation and of units by the criterion."""
    layers = walker.layers
    gradients = known.sensitivity if known and uses_gradients(options) else None
    if uses_gradients(options) and gradients is None:
        gradients = sensitivity.measure(layers, rows, options.batch_size, taylor=options.criterion == "taylor")
    by_loss = options.criterion == "obs" and "experts" in layers.anatomy.kinds  # experts are ranked by loss
    if gradients is None and by_loss:
        gradients = sensitivity.measure(layers, rows[::_PRICED_ROWS], options.batch_size)
    splits: list[PricedSplit] | None = None
    refinement: Refinement | None = None
    price: Price | None = None
    forms: Mapping[str, Form] = {}
    if known and known.forms is not None:
        forms = known.forms
    elif options.budgets:
        assert gradients is not None
        forms, price, refinement = _within(walker, rows, options, known, gradients)
    if forms:
        sizes = {name: form.size for name, form in forms.items()}
    else:
        sizes, splits, refinement = _sizes_to_keep(walker, rows, options, known, gradients)
    if options.criterion != "taylor" and not by_loss:
        gradients = None  # large, and no longer needed

    def by_score(layer: nn.Module, block: Block, read: Moments | Seen) -> Kept:
        size = sizes[block.name]
        if isinstance(read, Seen):
            return choose_experts(layer, block, size, read, _scoring(block, options, gradients))
        if size == block.size:
            return whole(block, _device(layer, block))
        weight = consumer_weight(layer, block).double()
        view = replace(_view(layer, block, weight, read, options, gradients), removed=block.units - size.units)
        return _choose(block, view, size, options.criterion, CRITERIA[options.criterion](view))

    schemes = {name: form.level.name for name, form in forms.items() if form.level is not None}
    return Chosen(by_score, lambda block: sizes[block.name], splits, schemes, refinement, price)


def planned(plan: Plan, names: Mapping[str, str]) -> Chosen:
    """Return a choice that follows `plan`; `names`: block name -> its name in the plan."""
    schemes = {name: scheme for name, other in names.items() if (scheme := plan.blocks[other].scheme) is not None}

    def as_planned(layer: nn.Module, block: Block, _read: Moments | Seen) -> Kept:
        return plan.blocks[names[block.name]].to_kept().to(_device(layer, block))

    def size(block: Block) -> Size:
        return plan.blocks[names[block.name]].to_kept().size

    return Chosen(as_planned, size, plan.splits, schemes, plan.refinement, plan.price)


def whole(block: Block, device: torch.device | None = None) -> Kept:
    """Return what is kept of a block that loses nothing."""
    return Kept.whole(torch.arange(block.units, device=device), block.members)


def everything() -> Chosen:
    """Return the choice that removes nothing."""
    return Chosen(lambda _layer, block, _read: whole(block), lambda block: block.size)


def _device(layer: nn.Module, block: Block) -> torch.device:
    return layer.get_parameter(block.reader.tensor).device


def nothing(block: Block) -> Kept:
    """Return what is kept of a removed block."""
    return Kept.whole(torch.empty(0, dtype=torch.long), block.members)


def blocks_of(layers: Layers) -> Iterator[tuple[nn.Module, Block]]:
    """Yield every block that has units, with its layer."""
    for index in progress(range(layers.anatomy.layers), "score", "layer"):
        with layers.layer(index) as layer:
            for block in layers.anatomy.of_layer(index):
                if block.units:
                    yield layer, block


def dense_inputs(walker: Walker, rows: Tensor, known: Known | None) -> Inputs:
    """Return the inputs of the dense model's blocks, collected now or earlier."""
    if known is None or known.moments is None:
        return PropagatedInputs(walker, rows)
    return PrecomputedInputs(known.moments)


def dense_reading(layer: nn.Module, block: Block, inputs: Inputs) -> Moments | Seen:
    """Return the inputs of the dense model's block."""
    if block.routing is None:
        return inputs.moments(layer, block)
    assert isinstance(inputs, PropagatedInputs)
    seen = inputs.experts(layer, block)
    inputs.pass_experts_on(layer, block)
    return seen


def _within(
    walker: Walker,
    rows: Tensor,
    options: PruneOptions,
    known: Known | None,
    gradients: Sensitivity,
) -> tuple[dict[str, Form], Price | None, Refinement | None]:
    """Return size and scheme of every block within the budgets, their price, and how sizes were refined.

    This takes a pass over the dense model.
    """
    layers = walker.layers
    anatomy, of_width = left_of(layers.anatomy, options, ())
    allowed = _allowed(anatomy, of_width)
    levels = levels_of(options.budget, options.target) if options.budget else ()
    errors = error_curves(layers, dense_inputs(walker, rows, known), options, gradients, least_units(allowed))
    schemes = [level for level in levels if level is not None]
    rounding = rounding_prices(walker, rows, gradients.output, schemes) if schemes else {}
    found = by_budgets(anatomy, of_width.budgets, options.target, allowed, errors, rounding)
    price = Price(  # further digits depend on the machine
        nats_per_token=float(f"{found.price:.4g}"), bound_nats_per_token=float(f"{found.bound:.4g}")
    )
    if options.refine == "none":
        return found.forms, price, None
    sizes = {name: form.size for name, form in found.forms.items()}
    sizes, refinement = _refined(walker, rows, options, known, gradients, errors, sizes)
    forms = {name: Form(size, None) for name, size in sizes.items()}
    return forms, None if refinement.confirmed else price, refinement


def _sizes_to_keep(
    walker: Walker,
    rows: Tensor,
    options: PruneOptions,
    known: Known | None,
    gradients: Sensitivity | None,
) -> tuple[dict[str, Size], list[PricedSplit] | None, Refinement | None]:
    """Return the size to keep by block name, the splits that `uniform` chose from, and how sizes were refined.

    This takes a pass over the dense model, unless `uniform` has nothing to choose or no error curve to choose by.
    """
    layers = walker.layers
    anatomy, of_width = left_of(layers.anatomy, options, ())
    ratio, allowed = of_width.ratio, sizes_allowed(anatomy, of_width)
    splits: list[Split] = []
    if options.allocation == "uniform":
        splits = [] if anatomy.of_kind("experts") else splits_meeting(anatomy, ratio, allowed)
        if len(splits) == 1 or options.compensation not in REFITTING:  # the curves are those of refitted consumers
            return uniform(anatomy, ratio, allowed), None, None
        gradients = gradients or sensitivity.measure(layers, rows[::_PRICED_ROWS], options.batch_size)
    inputs = dense_inputs(walker, rows, known)
    if options.allocation == "global":
        scores = dict.fromkeys((block.name for block in anatomy.blocks), torch.empty(0))
        divided = Divided(layers.processes)
        for layer, block in blocks_of(layers):
            divided.add(block.name, _ranks(layer, block, inputs, options, gradients))
        return global_sort(anatomy, ratio, allowed, scores | divided.results()), None, None
    assert gradients is not None
    fewest = {block.name: fewest_units(splits, block) for block in anatomy.blocks} if splits else least_units(allowed)
    errors = error_curves(layers, inputs, options, gradients, fewest)
    if options.allocation == "error":
        sizes = by_error(anatomy, ratio, allowed, errors)
        if options.refine == "none":
            return sizes, None, None
        sizes, refinement = _refined(walker, rows, options, known, gradients, errors, sizes)
        return sizes, None, refinement
    if not splits:
        return uniform(anatomy, ratio, allowed, errors), None, None
    considered = [
        PricedSplit(
            kv_groups=split.attention.units,
            query_heads=anatomy.of_kind("attention")[0].heads(Size(1, split.attention.members)),
            mlp_channels=split.mlp_channels,
            nats_per_token=float(f"{nats:.4g}"),  # other digits depend on the batch size and the machine
        )
        for split, nats in priced(splits, anatomy, errors).items()
    ]
    return uniform(anatomy, ratio, allowed, errors), considered, None


def _allowed(anatomy: Anatomy, options: PruneOptions) -> Sizes:
    """Return the sizes of every block that the allocation chooses from."""
    return sizes_within(anatomy, options.budgets, sizes_allowed(anatomy, options))


def _refined(
    walker: Walker,
    rows: Tensor,
    options: PruneOptions,
    known: Known | None,
    gradients: Sensitivity,
    errors: Errors,
    sizes: Mapping[str, Size],
) -> tuple[dict[str, Size], Refinement]:
    """Return the sizes to keep after a search that starts from `sizes`, and what it found."""
    inputs = dense_inputs(walker, rows, known)
    moments = {block.name: inputs.moments(layer, block) for layer, block in blocks_of(walker.layers)}
    space, levels = neighbourhood(walker.layers.anatomy, options, moments, gradients, errors, sizes)
    return refined(walker, rows, sizes, space, levels, seed=options.seed, minutes=options.refine_minutes)


def neighbourhood(
    anatomy: Anatomy,
    options: PruneOptions,
    moments: Mapping[str, Moments],
    gradients: Sensitivity,
    errors: Errors,
    sizes: Mapping[str, Size],
) -> tuple[Space, Levels]:
    """Return the plans that a search from `sizes` may try, and the weights that blocks have in them.

    Args:
        moments: of the dense model's blocks.
        errors: of removals, by block.
        sizes: by the allocation.
    """
    cost, limit = cost_and_limit(anatomy, options)
    space = Space.around(anatomy, sizes, _allowed(anatomy, options), errors, cost, limit)
    scores: dict[str, Tensor] = {}  # of the units of a block, which do not depend on its size

    def at_size(layer: nn.Module, block: Block, size: Size) -> Kept:
        weight = consumer_weight(layer, block).double()
        view = _view(layer, block, weight, moments[block.name], options, gradients)
        if block.name not in scores:
            scores[block.name] = CRITERIA[options.criterion](view)
        return _choose(block, view, size, options.criterion, scores[block.name])

    return space, Levels(at_size, moments, options.damping)


def least_units(allowed: Sizes) -> dict[str, int]:
    """Return the smallest number of units that each block may keep."""
    return {name: min(size.units for size in sizes) for name, sizes in allowed.items()}


@torch.no_grad()
def error_curves(
    layers: Layers, inputs: Inputs, options: PruneOptions, gradients: Sensitivity, fewest: Mapping[str, int]
) -> Errors:
    """Return the cost of each size of each block of the dense model.

    Args:
        inputs: of the blocks.
        fewest: block name -> smallest number of units that it keeps; smaller sizes are not priced.
    """
    errors = dict.fromkeys((block.name for block in layers.anatomy.blocks), torch.zeros(1, 1))
    divided = Divided(layers.processes)
    for layer, block in blocks_of(layers):
        members = options.limits.takes(block, "members")
        sensitivity = gradients.output[block.name]
        scores = _scores_prices(layer, block, inputs, sensitivity, options) if members and block.scores else None
        compute = _errors(layer, block, inputs, sensitivity, fewest[block.name], members=members, scores=scores)
        divided.add(block.name, compute)
    return errors | divided.results()


def _scores_prices(
    layer: nn.Module, block: Block, inputs: Inputs, sensitivity: Tensor, options: PruneOptions
) -> Tensor:
    """Return the cost of removing m dimensions of every head's queries and keys, (members,), non-decreasing.

    Numbers that the target does not allow cost as much as the next larger one that it does.
    """
    dims = [dims for dims in dims_of_scores(block, options.target) if dims < block.members]
    errors = inputs.errors_of_dims(layer, block, dims)
    prices = torch.full((block.members,), torch.inf, dtype=torch.float64)
    prices[0] = 0
    for kept, error in errors.items():
        prices[block.members - kept] = (sensitivity.to(error) * error).sum().clamp_min(0) / 2
    return prices.flip(0).cummin(0).values.flip(0).cummax(0).values


def _ranks(
    layer: nn.Module, block: Block, inputs: Inputs, options: PruneOptions, gradients: Sensitivity | None
) -> Callable[[], Tensor]:
    """Return what computes the scores of the dense model's block, (units,)."""
    read = dense_reading(layer, block, inputs)
    if isinstance(read, Seen):
        scores = expert_scores(layer, block, read, _scoring(block, options, gradients))
        return lambda: scores
    weight = consumer_weight(layer, block).double()
    view = _view(layer, block, weight, read, options, gradients)
    return lambda: CRITERIA[options.criterion](view)


def _errors(
    layer: nn.Module,
    block: Block,
    inputs: Inputs,
    sensitivity: Tensor,
    fewest: int,
    *,
    members: bool,
    scores: Tensor | None,
) -> Callable[[], Tensor]:
    """Return what computes the cost of each size with at least `fewest` units of the dense model's block.

    It returns (units + 1, members).
    """
    read = dense_reading(layer, block, inputs)
    if isinstance(read, Seen):
        table = error_table(layer, block, read, sensitivity)
        return lambda: table
    weight = consumer_weight(layer, block).double()
    return lambda: error_curve(
        weight, read.gram, sensitivity, block.size, fewest=fewest, members=members, scores=scores
    )


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
    layer: nn.Module,
    block: Block,
    weight: Tensor,
    moments: Moments,
    options: PruneOptions,
    gradients: Sensitivity | None,
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
        dimap=importances(layer, block) if options.criterion == "dimap" else None,
    )


def _choose(block: Block, view: BlockView, size: Size, criterion: str, scores: Tensor) -> Kept:
    """Return the highest of the units' `scores`, and the highest of the members of each of these units.

    Dimensions of queries and keys are in their order already (scores.py).
    """
    units = keep_highest(scores, size.units)
    if not size.units or size.members == view.members:
        return Kept.whole(units, view.members)
    if block.scores:
        return Kept.whole(units, size.members)
    scores = member_scores(criterion, view, units)
    return Kept(units, torch.stack([keep_highest(own, size.members) for own in scores]))
