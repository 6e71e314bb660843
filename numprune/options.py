"""What to remove and how: the options, and which of them can work for a model.

Nothing here looks at weights or text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from numprune.allocation import ALLOCATIONS, check_ratio, uniform
from numprune.axes import AXES, DEFAULT_AXES, Limits
from numprune.blocks import Anatomy
from numprune.byte_budget import ByteBudget
from numprune.criteria import CRITERIA
from numprune.depth import ratio_left, smallest_layers
from numprune.errors import InputError
from numprune.inputs import FROM_PRUNED_PREFIX
from numprune.plans import Plan
from numprune.quantization import check_quantizable
from numprune.quantization.allocation import Form, check_reachable, levels_of, model_bytes
from numprune.splits import splits_meeting
from numprune.surgery import can_hold_bias
from numprune.target import Sizes, Target, allowed_sizes

# `bias` is FLAP's own compensation; it is offered where an architecture can hold a bias. What each is worth stands in
# compensation.py.
COMPENSATIONS = ("none", "bias", "oneshot", "sequential", "residual", "joint")
REFITTING = ("oneshot", *FROM_PRUNED_PREFIX)
LEARNED = ("vib",)  # criteria of plans that numprune.learning made


@dataclass(frozen=True)
class PruneOptions:
    """What to remove and how.

    Attributes:
        ratio: share of the prunable parameters to remove; 0 where a budget says how much must go.
        criterion: a name of `criteria.CRITERIA`; where a plan says what to keep, one of `LEARNED` too.
        allocation: a name of `allocation.ALLOCATIONS`.
        compensation: one of `COMPENSATIONS`.
        target: what the server of the result needs of its sizes.
        axes, keep, floors, skips: as of `axes.Limits`. The allocation global cannot remove single query heads, and
            uniform no whole block.
        budget: bytes that the result may take, of allocation error; it decides the size of each block, and what it will
            be stored as. None: the ratio decides.
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
    budget: ByteBudget | None = None
    drop_layers: int = 0
    damping: float = 1e-3
    seed: int = 0
    batch_size: int = 8

    @property
    def limits(self) -> Limits:
        return Limits(self.axes, self.keep, self.floors, self.skips)


def uses_gradients(options: PruneOptions) -> bool:
    """Whether the loss's gradients are used: whether `Known.sensitivity` helps."""
    return options.allocation == "error" or options.criterion == "taylor"


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
        budget=plan.budget,
        drop_layers=plan.drop_layers,
        damping=plan.damping,
        seed=plan.seed,
    )


def check_options(anatomy: Anatomy, options: PruneOptions, *, planned: bool = False) -> None:
    """Refuse what cannot work before anything is run. `planned`: the units to keep are known, so nothing is scored.

    Raises:
        InputError: an unknown name, a ratio out of reach, or values that make no sense together.
    """
    for option, value, known in (
        ("criterion", options.criterion, (*CRITERIA, *LEARNED) if planned else tuple(CRITERIA)),
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
            "skips: uniform allocation gives every layer the same size, so no block can be removed; use error or global"
        )
    if options.skips and anatomy.attention_differs:
        raise InputError(
            "skips: a model with sliding windows in some layers only must keep the attention of every layer"
        )
    if options.skips and any(block.post_norms for block in anatomy.blocks):
        raise InputError(
            f"skips: in {anatomy.family} a norm follows each block and would be removed with it, so a block's output "
            "does not determine its value"
        )
    if options.skips and options.compensation == "bias":
        raise InputError("skips: a removed block has no bias for compensation; use another compensation")
    if options.compensation == "bias" and not can_hold_bias(anatomy.family):
        raise InputError(
            f"compensation bias: the projections of {anatomy.family} cannot have a bias; use another compensation"
        )
    if options.budget is not None:
        _check_budget(anatomy, options, options.budget)
    options.limits.check(anatomy)
    members = [name for name in options.axes if AXES[name].part == "members" and AXES[name].kind in anatomy.kinds]
    if members and options.allocation == "global":
        raise InputError(
            f"axes: allocation global sorts whole units; omit {', '.join(members)}, or use allocation error"
        )
    if options.allocation == "uniform":
        _check_same_in_every_layer(anatomy, options)
    dropped = smallest_layers(anatomy, options.drop_layers, protected_layers(anatomy, options))
    rest, left = left_of(anatomy, options, dropped)
    allowed = sizes_allowed(rest, left)
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


def _check_budget(anatomy: Anatomy, options: PruneOptions, budget: ByteBudget) -> None:
    if options.ratio:
        raise InputError(
            f"ratio is {options.ratio}, and a budget is given; set the ratio to 0, or leave one of them out"
        )
    if options.allocation != "error":
        raise InputError(f"a budget is divided by error; allocation is {options.allocation!r}, set it to error")
    if options.drop_layers:
        raise InputError("drop_layers: layers are dropped by the ratio; leave it out, or use a ratio and no budget")
    if options.compensation == "bias":
        raise InputError("compensation bias adds tensors that a budget does not count; use another compensation")
    levels = levels_of(budget, options.target)
    for scheme in (level for level in levels if level is not None):
        check_quantizable(anatomy, replace(scheme, group_size=None))  # sizes that its groups divide are allowed only
        if scheme.group_size and anatomy.hidden_size % scheme.group_size:
            raise InputError(
                f"quantization_group is {scheme.group_size}, which does not divide the model's hidden_size "
                f"{anatomy.hidden_size}; choose another, or store no block in {scheme.name}"
            )
    check_reachable(anatomy, budget, levels, sizes_allowed(anatomy, options))
    whole = model_bytes(anatomy, {block.name: Form(block.size, None) for block in anatomy.blocks}, budget)
    if None in levels and whole <= budget.limit:
        raise InputError(
            f"the budget is {budget.limit:,} bytes, and the model takes {whole:,} as it is: nothing has to go; choose "
            "a smaller budget"
        )


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


def known_results(anatomy: Anatomy, options: PruneOptions) -> list[Anatomy]:
    """Return what may be left of the model, as far as its configuration tells.

    One anatomy where nothing is priced, several where `uniform` prices them and takes one, none where each layer gets a
    size of its own, or where there are experts and so too many to list. Which layers are dropped does not matter: under
    `uniform` all are of one size.

    Raises:
        InputError: as `check_options`.
    """
    check_options(anatomy, options)
    if options.allocation != "uniform" or (anatomy.of_kind("experts") and options.compensation in REFITTING):
        return []
    dropped = smallest_layers(anatomy, options.drop_layers, protected_layers(anatomy, options))
    rest, left = left_of(anatomy, options, dropped)
    if anatomy.of_kind("experts"):
        return [rest.keeping(uniform(rest, left.ratio, sizes_allowed(rest, left)))]
    splits = splits_meeting(rest, left.ratio, sizes_allowed(rest, left))
    if options.compensation not in REFITTING:
        splits = splits[:1]
    return [rest.keeping(split.sizes(rest)) for split in splits]


def protected_layers(anatomy: Anatomy, options: PruneOptions) -> set[int]:
    """Return the layers with a block that loses nothing: they are not dropped."""
    protected = options.limits.protected(anatomy)
    return {block.layer for block in anatomy.blocks if block.name in protected}


def left_of(anatomy: Anatomy, options: PruneOptions, dropped: Sequence[int]) -> tuple[Anatomy, PruneOptions]:
    """Return what is left without these layers, and the options for that: its share of the ratio, its blocks' names."""
    if not dropped:
        return anatomy, options
    rest, protected = anatomy.without(dropped), options.limits.protected(anatomy)
    before = [block.name for block in anatomy.blocks if block.layer not in dropped]
    keep = [block.name for block, name in zip(rest.blocks, before, strict=True) if name in protected]
    ratio = ratio_left(anatomy, options.ratio, dropped)
    return rest, replace(options, ratio=ratio, keep=keep, drop_layers=0)


def sizes_allowed(anatomy: Anatomy, options: PruneOptions) -> Sizes:
    """Return the sizes that each block may be left with; uniform ones are those that a stock configuration holds."""
    return allowed_sizes(anatomy, options.target, options.limits, stock=options.allocation == "uniform")
