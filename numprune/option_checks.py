"""Whether pruning options are valid for a model, and the results known without weights or text."""

from collections.abc import Sequence
from dataclasses import replace

from numprune.allocation import ALLOCATIONS, check_ratio, uniform
from numprune.axes import AXES, HIDDEN_SIZE
from numprune.blocks import Anatomy
from numprune.budget import budget_of
from numprune.budgeted import check_budgets, check_needed
from numprune.byte_budget import ByteBudget
from numprune.criteria import CRITERIA
from numprune.depth import smallest_blocks, smallest_layers
from numprune.errors import InputError
from numprune.families import FAMILIES
from numprune.hidden import BASES, check_hidden_size, check_narrowable, hidden_sizes, narrowed
from numprune.options import (
    COMPENSATIONS,
    LEARNED,
    REFITTING,
    PruneOptions,
    left_of,
    protected_layers,
    sizes_allowed,
    with_shape,
    without_windows,
)
from numprune.quantization import check_quantizable
from numprune.quantization.allocation import levels_of
from numprune.refinement import MINUTES, REFINEMENTS
from numprune.shape import PLAIN, Shape
from numprune.spans import check_window, enough, least_windows
from numprune.splits import splits_meeting
from numprune.surgery import can_hold_bias


def check_options(anatomy: Anatomy, options: PruneOptions, *, planned: bool = False) -> None:
    """Refuse invalid options before any work. `planned`: the units to keep are known, so nothing is scored.

    Raises:
        InputError: an unknown name, an unreachable ratio, or values that contradict each other.
    """
    for option, value, known in (
        ("criterion", options.criterion, (*CRITERIA, *LEARNED) if planned else tuple(CRITERIA)),
        ("allocation", options.allocation, tuple(ALLOCATIONS)),
        ("compensation", options.compensation, COMPENSATIONS),
        ("refine", options.refine, REFINEMENTS),
    ):
        if value not in known:
            raise InputError(f"{option} is {value!r}; it must be one of {', '.join(known)}")
    if options.criterion == "frequency" and "experts" not in anatomy.kinds:
        raise InputError(f"criterion frequency ranks experts, and {anatomy.family} has none; use another criterion")
    if options.criterion == "dimap" and "experts" in anatomy.kinds:
        raise InputError(f"criterion dimap ranks no experts, and {anatomy.family} has some; use another criterion")
    if not 0 <= options.damping < float("inf"):
        raise InputError(f"damping is {options.damping}; it must be 0 or more")
    if options.batch_size < 1:
        raise InputError(f"batch_size is {options.batch_size}; it must be at least 1")
    anatomy, options = beside_windows(anatomy, options)
    if options.skips or options.drop_blocks:
        _check_removing_blocks(anatomy, options, "skips" if options.skips else "drop_blocks")
    if options.compensation == "bias" and not can_hold_bias(anatomy.family):
        raise InputError(
            f"compensation bias: the projections of {anatomy.family} cannot have a bias; use another compensation"
        )
    if options.budgets:
        _check_budgeted(anatomy, options)
    _check_refined(anatomy, options, planned=planned)
    if options.shapes:
        _check_shapes(anatomy, options)
        return
    options.limits.check(anatomy)
    _check_hidden(anatomy, options, planned=planned)
    part_of = {name: axis for name, axis in AXES.items() if axis.kind in anatomy.kinds}
    members = [name for name in options.axes if name in part_of and part_of[name].part == "members"]
    if members and options.allocation == "global":
        raise InputError(
            f"axes: allocation global sorts whole units; omit {', '.join(members)}, or use allocation error"
        )
    _check_scores(anatomy, options)
    if options.allocation == "uniform":
        _check_same_in_every_layer(anatomy, options)
    dropped = smallest_layers(anatomy, options.drop_layers, protected_layers(anatomy, options))
    blocks = smallest_blocks(anatomy, options.drop_blocks, options.limits.protected(anatomy))
    rest, left = left_of(anatomy, options, dropped, blocks)
    allowed = sizes_allowed(rest, left)
    smaller = bool(dropped or blocks or options.hidden_size)
    try:
        if left.budgets:
            check_budgets(rest, left.budgets, left.target, allowed, smaller=smaller)
        check_ratio(rest, left.ratio, allowed)
        if options.allocation == "uniform":
            uniform(rest, left.ratio, allowed)
    except InputError as error:
        if not dropped and not blocks:
            raise
        what, count = ("layers", len(dropped)) if dropped else ("blocks", len(blocks))
        must = "" if left.budgets else f" the other {what} must lose {left.ratio:.4f} of theirs"
        raise InputError(f"with drop_{what} {count}{must}: {error}") from None


def beside_windows(anatomy: Anatomy, options: PruneOptions) -> tuple[Anatomy, PruneOptions]:
    """Return the anatomy with as few windows as the options ask for, and the options for the rest of the pruning.

    Raises InputError for windows that the model cannot have, or not beside other options.
    """
    window, count, budget = options.window, options.window_layers, options.sequence_budget
    if window is None and not count and budget is None:
        return anatomy, options
    check_window(anatomy, window, count, budget)
    assert window is not None
    for given, what, remedy in (
        (options.time_budget, "blocks with a window were not timed", "use another budget"),
        (options.shapes, "candidates of hidden_size and drop_layers are compared without windows", "give one of each"),
        (options.hidden_size, "hidden_size is chosen on the model without windows", "leave hidden_size out"),
        (options.refine != "none", "the search measures plans without windows", "set refine to none"),
        (
            options.drop_layers or options.drop_blocks,
            "a dropped layer could be one that gets a window",
            "leave drop_layers and drop_blocks out",
        ),
    ):
        if given:
            raise InputError(f"window is {window}: {what}; {remedy}, or prune twice")
    return least_windows(anatomy, window, enough(anatomy, window, count, budget)), without_windows(options)


def _check_scores(anatomy: Anatomy, options: PruneOptions) -> None:
    """Refuse the axis of dimensions of queries and keys where it cannot be used."""
    if "qk-dims" not in options.axes:
        return
    reason = None
    if not any(block.scores for block in anatomy.blocks):
        families = ", ".join(name for name, family in FAMILIES.items() if family.attention.scores)
        reason = f"{anatomy.family} does not only multiply queries with keys, as {families} do"
    elif options.allocation == "uniform":
        reason = "uniform allocation keeps stock shapes, which have as many as values; or use allocation error"
    elif options.refine != "none":
        reason = "the search does not fit scores; or set refine to none"
    elif options.time_budget is not None:
        reason = "blocks with fewer were not timed; or use a ratio or a budget of bytes"
    if reason:
        raise InputError(f"axes: omit qk-dims, the dimensions of queries and keys: {reason}")


def _check_refined(anatomy: Anatomy, options: PruneOptions, *, planned: bool) -> None:
    if options.refine == "none":
        if options.refine_minutes != MINUTES:
            raise InputError(
                f"refine_minutes is {options.refine_minutes:g}; it has an effect only with refine search, leave it out"
            )
        return
    if planned:
        raise InputError("refine: a plan or trained masks choose the sizes; leave refine out")
    if not 0 < options.refine_minutes < float("inf"):
        raise InputError(f"refine_minutes is {options.refine_minutes}; it must be more than 0, and finite")
    if options.allocation != "error":
        raise InputError(
            f"refine: the search starts from the sizes of allocation error; allocation is {options.allocation!r}, set "
            "it to error"
        )
    if options.compensation not in REFITTING:
        raise InputError(
            f"refine: the search measures refitted weights; compensation is {options.compensation!r}, use one of "
            f"{', '.join(REFITTING)}"
        )
    if anatomy.of_kind("experts"):
        raise InputError("refine: the search does not refit experts; leave refine out")
    if options.hidden_size is not None:
        raise InputError("refine: the search keeps the hidden size; leave hidden_size or refine out")
    if options.drop_blocks:
        raise InputError("refine: the search keeps every block; leave drop_blocks or refine out")
    if len(options.budgets) > 1:
        raise InputError("refine: the search keeps within one budget, and several are given; leave refine out")
    if options.budget is not None and options.budget.levels != (None,):
        schemes = " or ".join(level for level in options.budget.levels if level is not None)
        raise InputError(
            f"refine: the search measures weights that are not quantized, and the budget counts blocks in {schemes}; "
            "leave refine out, or quantize to none"
        )


def _check_shapes(anatomy: Anatomy, options: PruneOptions) -> None:
    """Refuse candidates of which one is invalid by itself, or none is within the ratio or the budget.

    The model's own shape need not be within it, but must not be without losing anything: it would always be chosen.
    """
    what = "hidden_size, drop_layers: candidates"
    if options.hidden_size is not None or options.drop_layers or options.drop_blocks:
        raise InputError(f"{what} are given, and hidden_size, drop_layers or drop_blocks too; leave one of them out")
    if options.allocation not in ("error", "uniform"):
        raise InputError(f"{what} are compared by price; allocation is {options.allocation!r}, set it to error")
    if options.compensation not in REFITTING:
        raise InputError(
            f"{what} are priced with refitted weights; compensation is {options.compensation!r}, use one of "
            f"{', '.join(REFITTING)}"
        )
    if options.refine != "none":
        raise InputError(f"{what} are chosen before sizes are refined; leave refine out, or give one of each")
    if anatomy.of_kind("experts"):
        raise InputError(f"{what} are not supported for models with experts; give one of each")
    others = [shape for shape in options.shapes if shape != PLAIN]
    if not others:
        raise InputError(f"{what} are only the model's own hidden size and number of layers; add another, or omit them")
    if options.budgets:
        check_needed(anatomy, options.budgets, options.target)
    elif not options.ratio:
        raise InputError(f"{what} are compared at one ratio or budget, and ratio is 0; set one, or give one of each")
    for size in dict.fromkeys(shape.hidden_size for shape in others):
        alone = with_shape(options, Shape(size, 0))
        if options.budgets:
            _check_budgeted(anatomy, alone)
        _check_hidden(anatomy, alone, planned=False)
    for count in dict.fromkeys(shape.drop_layers for shape in others):
        smallest_layers(anatomy, count, protected_layers(anatomy, options))
    refusals = []
    for shape in others:
        try:
            check_options(anatomy, with_shape(options, shape))
        except InputError as error:
            refusals.append(error)
    if len(refusals) == len(others):
        raise refusals[0]


def _check_removing_blocks(anatomy: Anatomy, options: PruneOptions, asked: str) -> None:
    if options.drop_blocks and options.drop_layers:
        raise InputError("drop_blocks and drop_layers are given; leave one of them out")
    if options.drop_blocks and "experts" in anatomy.kinds:
        raise InputError("drop_blocks: models with experts are not supported; use drop_layers")
    if options.allocation == "uniform":
        raise InputError(
            f"{asked}: uniform allocation gives every layer the same size, so no block can be removed; use error or "
            "global"
        )
    if anatomy.attention_differs:
        raise InputError(
            f"{asked}: a model with sliding windows in some layers only must keep the attention of every layer"
        )
    if any(block.post_norms for block in anatomy.blocks):
        raise InputError(
            f"{asked}: in {anatomy.family} a norm follows each block and would be removed with it, so a block's output "
            "does not determine its value"
        )
    if options.compensation == "bias":
        raise InputError(f"{asked}: a removed block has no bias for compensation; use another compensation")


def _check_hidden(anatomy: Anatomy, options: PruneOptions, *, planned: bool) -> None:
    if HIDDEN_SIZE in options.axes and options.hidden_size is None and not planned:
        raise InputError(
            "axes: only trained masks choose the hidden size; set hidden_size, use numprune learn (in a recipe: "
            f"learn.method), or leave out {HIDDEN_SIZE}"
        )
    if HIDDEN_SIZE in options.axes:
        check_narrowable(anatomy)
    if options.hidden_size is None:
        return
    check_hidden_size(anatomy, options.hidden_size, options.target)
    if options.basis not in BASES:
        raise InputError(f"basis is {options.basis!r}; it must be one of {', '.join(BASES)}")
    # A budget of time counts the output matrix that a rotation adds.
    is_counted = options.time_budget is not None and options.hidden_size < anatomy.hidden_size
    if options.basis == "fisher" and not is_counted:
        _check_rotation(anatomy, options.hidden_size, hidden_sizes(anatomy, options.target))


def _check_rotation(anatomy: Anatomy, hidden_size: int, sizes: Sequence[int]) -> None:
    """Refuse a rotation whose output matrix of its own has more parameters than the smaller hidden size saves."""

    def parameters(size: int) -> int:
        return budget_of(narrowed(anatomy, size, "fisher")).parameters

    before, after = budget_of(anatomy).parameters, parameters(hidden_size)
    if after < before:
        return
    smaller = [size for size in sizes if parameters(size) < before]
    reason = (
        f"needs an output matrix of its own, {anatomy.vocabulary * hidden_size:,} parameters, which this model shares "
        "with the embedding"
        if anatomy.is_tied
        else "removes nothing"
    )
    remedy = f"choose at most {smaller[-1]}, or the basis coordinates" if smaller else "choose the basis coordinates"
    raise InputError(
        f"hidden_size is {hidden_size}: in the basis fisher it {reason}, so the model would have {after:,} parameters "
        f"instead of {before:,}; {remedy}"
    )


def _check_budgeted(anatomy: Anatomy, options: PruneOptions) -> None:
    if options.ratio:
        raise InputError(
            f"ratio is {options.ratio}, and a budget is given; set the ratio to 0, or leave one of them out"
        )
    if options.allocation != "error":
        raise InputError(f"a budget is divided by error; allocation is {options.allocation!r}, set it to error")
    if HIDDEN_SIZE in options.axes:
        raise InputError(
            f"axes: a budget counts embeddings at their full size; leave out {HIDDEN_SIZE}, or give a ratio"
        )
    if options.kv_budget is not None and anatomy.task != "causal-lm":
        raise InputError(f"the budget is {options.kv_budget}, and this {anatomy.task} model has no KV cache")
    if options.budget is not None:
        _check_storable(anatomy, options, options.budget)


def _check_storable(anatomy: Anatomy, options: PruneOptions, budget: ByteBudget) -> None:
    if options.compensation == "bias":
        raise InputError("compensation bias adds tensors that a budget does not count; use another compensation")
    levels = levels_of(budget, options.target)
    for scheme in (level for level in levels if level is not None):
        check_quantizable(anatomy, replace(scheme, group_size=None))  # only sizes that its groups divide are allowed
        if scheme.group_size and anatomy.hidden_size % scheme.group_size:
            raise InputError(
                f"quantization_group is {scheme.group_size}, which does not divide the model's hidden_size "
                f"{anatomy.hidden_size}; choose another, or store no block in {scheme.name}"
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


def known_results(anatomy: Anatomy, options: PruneOptions, *, planned: bool = False) -> list[Anatomy]:
    """Return the possible results as far as the configuration determines them; `planned` as in `check_options`.

    One anatomy if nothing is priced, several if `uniform` chooses one by price, and none if each layer gets its own
    size, the shape is chosen, or there are experts (too many to list). It does not matter which layers are dropped:
    under `uniform`, all have the same size.

    Raises:
        InputError: like `check_options`.
    """
    check_options(anatomy, options, planned=planned)
    anatomy, options = beside_windows(anatomy, options)
    if (
        options.shapes
        or options.allocation != "uniform"
        or (anatomy.of_kind("experts") and options.compensation in REFITTING)
    ):
        return []
    dropped = smallest_layers(anatomy, options.drop_layers, protected_layers(anatomy, options))
    rest, left = left_of(anatomy, options, dropped)
    if anatomy.of_kind("experts"):
        return [rest.keeping(uniform(rest, left.ratio, sizes_allowed(rest, left)))]
    splits = splits_meeting(rest, left.ratio, sizes_allowed(rest, left))
    if options.compensation not in REFITTING:
        splits = splits[:1]
    return [rest.keeping(split.sizes(rest)) for split in splits]
