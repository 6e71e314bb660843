"""The pruning options, and what is left of them once layers, blocks or coordinates are removed.

Nothing here depends on weights or text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod

from numprune.axes import DEFAULT_AXES, Limits
from numprune.blocks import Anatomy
from numprune.budget import budget_of
from numprune.budgeted import Budget
from numprune.byte_budget import ByteBudget
from numprune.cache_budget import KvBudget, SequenceBudget
from numprune.depth import ratio_left, without_blocks
from numprune.hidden import Basis, Width, narrowed, ratio_beside
from numprune.inputs import FROM_PRUNED_PREFIX
from numprune.plans import Plan
from numprune.refinement import MINUTES
from numprune.shape import Shape
from numprune.target import Sizes, Target, allowed_sizes
from numprune.time_budget import TimeBudget

# `bias` is FLAP's own compensation, for architectures whose projections can have a bias. compensation.py describes all.
COMPENSATIONS = ("none", "bias", "oneshot", "sequential", "residual", "joint")
REFITTING = ("oneshot", *FROM_PRUNED_PREFIX)
LEARNED = ("vib", "movement")  # criteria of plans made by numprune.learning and numprune.schedules


@dataclass(frozen=True)
class PruneOptions:
    """What to remove and how.

    Attributes:
        ratio: share of the prunable parameters to remove; 0 with a budget.
        criterion: a name in `criteria.CRITERIA`; if a plan determines what to keep, also one of `LEARNED`.
        allocation: a name in `allocation.ALLOCATIONS`.
        compensation: one of `COMPENSATIONS`.
        target: the server's requirements on the sizes of the result.
        axes, keep, floors, skips: as in `axes.Limits`. The allocation `global` cannot remove single query heads, and
            `uniform` cannot remove whole blocks.
        budget: largest size of the result in bytes, for the allocation `error`; it determines the size of each block
            and how it will be stored.
        time_budget: longest step of the result, likewise; also together with `budget`.
        kv_budget: largest KV cache of the result, likewise. Without any budget, the ratio determines the sizes.
        sequence_budget: largest KV cache of one sequence, which windows keep; also beside a ratio or other budgets.
        window: tokens that some layers will see; they are chosen first. None: all see as many as before.
        window_layers: number of these layers; 0: as many as `sequence_budget` needs.
        drop_layers: number of whole layers to remove; units make up the rest of the ratio.
        drop_blocks: number of attention blocks and MLPs to remove, likewise; instead of `drop_layers`.
        hidden_size: of the result; units make up the rest of the ratio. None: it stays, or masks choose it.
        shapes: candidates of `hidden_size` and `drop_layers`, the model's own among them, of which `choose_shape` of
            shaping.py takes one; the two are then not set. Empty: there is nothing to choose.
        basis: which coordinates a smaller hidden size keeps, see basis.py.
        refine: "search": search for better sizes of the same budget, starting from those of the allocation `error`
            (numprune.search); "none": do not. A plan that is followed is not refined again.
        refine_minutes: time limit of the search.
        damping: of the least squares, relative to the mean of diag(G). If the inputs come from the pruned prefix, the
            damping is chosen on held-out calibration rows, and this is the smallest value tried.
        seed: of random criteria, and of the search.
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
    budget: ByteBudget | None = None
    time_budget: TimeBudget | None = None
    kv_budget: KvBudget | None = None
    sequence_budget: SequenceBudget | None = None
    window: int | None = None
    window_layers: int = 0
    drop_layers: int = 0
    drop_blocks: int = 0
    hidden_size: int | None = None
    shapes: Sequence[Shape] = ()
    basis: Basis = "fisher"
    refine: str = "none"
    refine_minutes: float = MINUTES
    damping: float = 1e-3
    seed: int = 0
    batch_size: int = 8

    @property
    def budgets(self) -> list[Budget]:
        """The budgets that are given."""
        return [budget for budget in (self.budget, self.time_budget, self.kv_budget) if budget is not None]

    @property
    def limits(self) -> Limits:
        return Limits(self.axes, self.keep, self.floors, self.skips)


def uses_gradients(options: PruneOptions) -> bool:
    """Return whether the gradients of the loss are used, and thus `Known.sensitivity`."""
    return options.allocation == "error" or options.criterion == "taylor"


def options_of(plan: Plan) -> PruneOptions:
    """Return the options with which a plan was made."""
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
        budget=plan.budget,
        time_budget=plan.time_budget,
        kv_budget=plan.kv_budget,
        sequence_budget=plan.sequence_budget,
        window=plan.window,
        window_layers=plan.window_layers,
        drop_layers=plan.drop_layers,
        drop_blocks=plan.drop_blocks,
        hidden_size=len(plan.hidden.kept) if plan.hidden else None,
        basis=plan.hidden.basis if plan.hidden else "fisher",
        damping=plan.damping,
        seed=plan.seed,
    )


def without_windows(options: PruneOptions) -> PruneOptions:
    """Return the options for the rest of the pruning of a model with windows."""
    return replace(options, sequence_budget=None, window=None, window_layers=0)


def with_shape(options: PruneOptions, shape: Shape) -> PruneOptions:
    """Return the options for one shape."""
    return replace(options, shapes=(), hidden_size=shape.hidden_size, drop_layers=shape.drop_layers)


def widths_of(anatomy: Anatomy, options: PruneOptions) -> list[Width | None]:
    """Return the hidden sizes that the result may have, each once; None: the model's own."""
    sizes = [shape.hidden_size for shape in options.shapes] or [options.hidden_size]
    return list(
        dict.fromkeys(None if size in (None, anatomy.hidden_size) else Width(size, options.basis) for size in sizes)
    )


def widths_timed(anatomy: Anatomy, options: PruneOptions) -> list[Width | None]:
    """Return the hidden sizes at which a budget of time needs latencies: `widths_of`, and the model's for a speedup."""
    widths = widths_of(anatomy, options)
    if options.time_budget is not None and options.time_budget.speedup is not None and None not in widths:
        widths.append(None)
    return widths


def protected_layers(anatomy: Anatomy, options: PruneOptions) -> set[int]:
    """Return the layers with a protected block: they are not dropped."""
    protected = options.limits.protected(anatomy)
    return {block.layer for block in anatomy.blocks if block.name in protected}


def left_of(
    anatomy: Anatomy, options: PruneOptions, dropped: Sequence[int], blocks: Sequence[str] = ()
) -> tuple[Anatomy, PruneOptions]:
    """Return the anatomy without these layers or blocks, at the new hidden size, and the options for it.

    These have its share of the ratio, or its budgets, and its block names.
    """
    if blocks:
        ratio = 0.0 if options.budgets else ratio_left(anatomy, options.ratio, (), blocks)
        anatomy, options = without_blocks(anatomy, blocks), replace(options, ratio=ratio, drop_blocks=0)
    if dropped:
        rest, protected = anatomy.without(dropped), options.limits.protected(anatomy)
        before = [block.name for block in anatomy.blocks if block.layer not in dropped]
        keep = [block.name for block, name in zip(rest.blocks, before, strict=True) if name in protected]
        ratio = 0.0 if options.budgets else ratio_left(anatomy, options.ratio, dropped)
        anatomy, options = rest, replace(options, ratio=ratio, keep=keep, drop_layers=0)
    if options.hidden_size is not None:
        narrow = narrowed(anatomy, options.hidden_size, options.basis)
        whole, left = (budget_of(one).prunable_parameters for one in (anatomy, narrow))
        ratio = ratio_beside(options.ratio, whole, left)
        options = around_left(replace(options, ratio=ratio, hidden_size=None), anatomy, narrow)
        anatomy = narrow
    return anatomy, options


def around_left(options: PruneOptions, before: Anatomy, after: Anatomy) -> PruneOptions:
    """Return the options with a budget of bytes that counts the embeddings and norms of `after`, not `before`."""
    if options.budget is None:
        return options
    left, whole = after.fixed_parameters, before.fixed_parameters
    budget = options.budget.resized(whole, left)
    of_heads = sum(prod(block.shared[name]) for block in after.blocks for name in block.head_norms)
    unchanged = max(0, -(-budget.value * of_heads * (whole - left) // whole))  # these norms do not become narrower
    return replace(options, budget=replace(budget, around=budget.around + unchanged))


def sizes_allowed(anatomy: Anatomy, options: PruneOptions) -> Sizes:
    """Return the sizes allowed for each block; for `uniform`, those that a stock configuration can represent."""
    return allowed_sizes(anatomy, options.target, options.limits, stock=options.allocation == "uniform")
