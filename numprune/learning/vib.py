"""Learn masks that choose the units to keep: the variational information bottleneck at a given size.

Minimized over the masks and, if they are trained, the weights (VTrans, arXiv 2406.05276; TVA-Prune, whose code is
github.com/oshindutta/TVAprune):

    D + beta * sum_k w_k * 1/2 log(1 + mu_k^2 / sigma_k^2) + l1 (s - t) + l2 (s - t)^2

D is the task's divergence of the masked model from the dense one (for language models, the KL divergence of their
distributions). The papers use the loss on labels instead; D needs no labels, so it suits every task, and it is 0 if
every mask is 1. s is the kept share of the counted cost (prunable parameters, FLOPs, bytes of the weights or of the KV
cache, or measured time), w_k the unit's cost relative to the cheapest unit, and t the target of s, which falls linearly
from 1 over the first steps. l1 and l2 are updated by gradient ascent, in units of the cost of removing random units, so
they suit every task's loss.

With the axis hidden-size, the residual stream's coordinates have masks, too: one for each in the whole model. Most
costs are then products of a unit's and the kept share of coordinates. A coordinate's w is its cost in all blocks
together, as for units, so that the sum of prices that rounding minimizes compares both; TVA-Prune sets 30.

After t has fallen, the masks are rounded several times to sizes that meet the budget, and the result is evaluated by D
on rows not used for training. The best result is kept; masks that meet the budget by themselves take precedence over
those that only meet it by rounding.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor
from transformers import PreTrainedModel

from numprune.allocation import check_ratio
from numprune.anatomy import read_anatomy
from numprune.axes import AXES, HIDDEN_SIZE
from numprune.blocks import Anatomy, Block
from numprune.calibration import check_rows
from numprune.errors import InputError
from numprune.experts.channels import has_biases
from numprune.hidden import hidden_sizes
from numprune.learning.constraint import Constraint, Counted
from numprune.learning.masks import Masked, Masks, fold
from numprune.learning.rounding import ALLOCATIONS, sizes_under, under
from numprune.learning.stream import Stream, fold_stream
from numprune.learning.training import Training
from numprune.option_checks import check_options
from numprune.options import PruneOptions, sizes_allowed
from numprune.plans import BlockPlan, HiddenPlan, Plan
from numprune.pruning import describe
from numprune.recovery.state import TrainingState
from numprune.slices import GONE
from numprune.target import Sizes
from numprune.tasks import CAUSAL, Task

Variant = Literal["full", "fast", "faster"]

SELECTION_ROWS = 16
LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Record:
    """How masks were learned.

    Attributes:
        variant: of the method.
        steps, tokens, seconds: of the training.
        best_step: the step whose masks were kept.
        constraint: the counted cost.
        removed: share of it that the plan removes.
        kept: share of it that the masks kept by themselves, before rounding.
        divergence: of the result from the dense model on the selection rows, before refitting.
        unit: of the divergence.
        hidden_size: what is kept, and of what; None: it had no masks.
    """

    variant: Variant
    steps: int
    tokens: int
    seconds: float
    best_step: int
    constraint: Counted
    removed: float
    kept: float
    divergence: float
    unit: str
    hidden_size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Learned:
    """The result of learning.


    Attributes:
        plan: for `model` or, if that is None, for the given model.
        model: with trained weights and the masks folded into them; None if only masks were trained.
        record: of the training.
    """

    plan: Plan
    model: PreTrainedModel | None
    record: Record


def check_learning(anatomy: Anatomy, options: PruneOptions, counted: Counted = "parameters", length: int = 1) -> None:
    """Refuse invalid options before any work; `counted` and `length` as in `Constraint`.

    Raises:
        InputError: like `check_options`, or masks cannot learn what the options request.
    """
    if options.kv_budget is not None:
        raise InputError(
            "budget: masks are not trained for a budget of KV cache; use a ratio with the constraint kv-bytes"
        )
    if len(options.budgets) > 1:
        raise InputError("budget: masks are trained for one budget, and several are given; choose one of them")
    for limited, given, example in (
        ("bytes", options.budget, "6GiB"),
        ("milliseconds", options.time_budget, "20ms@decode,b=8,ctx=2048"),
    ):
        if given is None and counted == limited:
            raise InputError(
                f"constraint {counted}: they are limited by a budget, like {example}; give one in place of the ratio"
            )
        if given is not None and counted != limited:
            raise InputError(f"budget: it limits {limited}, and the constraint is {counted}; leave one of them out")
    if options.budget is not None and options.budget.levels != (None,):
        raise InputError(
            "budget: masks choose sizes for weights that are not quantized; use a ratio, or leave the scheme out"
        )
    if options.drop_layers or options.shapes:
        raise InputError("drop_layers: masks learn units, not layers; drop layers with numprune prune")
    if options.window is not None or options.window_layers or options.sequence_budget is not None:
        raise InputError("window: masks learn units, not attention spans; give windows with numprune prune")
    if options.drop_blocks:
        raise InputError("drop_blocks: masks remove blocks with skips; use that instead")
    if options.hidden_size is not None:
        raise InputError(f"hidden_size: masks choose it if axes has {HIDDEN_SIZE}; leave it out")
    if "expert-channels" in options.axes and any(has_biases(block) for block in anatomy.of_kind("experts")):
        raise InputError(
            f"axes: the experts of {anatomy.family} have biases, and masks are on whole ones; leave out expert-channels"
        )
    if options.allocation not in ALLOCATIONS:
        raise InputError(f"allocation is {options.allocation!r}; masks are rounded by one of {', '.join(ALLOCATIONS)}")
    narrowest = hidden_sizes(anatomy, options.target)[0] if HIDDEN_SIZE in options.axes else None
    # Units can make up the rest of the ratio at some hidden size if they can at the smallest.
    options = replace(options, hidden_size=narrowest, basis="coordinates")
    constraint = Constraint(counted, anatomy, length, budget := options.budget or options.time_budget)
    if budget is not None and HIDDEN_SIZE in options.axes:
        raise InputError(f"axes: a budget is met by units alone; leave out {HIDDEN_SIZE}, or use a ratio")
    if counted == "kv-bytes" and HIDDEN_SIZE in options.axes:
        raise InputError(f"axes: the hidden size does not change the KV cache; leave out {HIDDEN_SIZE}")
    if counted == "kv-bytes" and "kv-groups" not in options.axes:
        raise InputError("axes: the constraint kv-bytes only removes KV groups; add kv-groups")
    if counted in ("parameters", "bytes", "milliseconds"):
        check_options(anatomy, options, planned=True)
        if budget is not None:
            _check_ratio(constraint, options)
        if options.time_budget is not None:
            _check_measured(constraint, options)
    elif options.allocation == "uniform":
        raise InputError(f"allocation is 'uniform', which splits parameters; use error with the constraint {counted}")
    elif not constraint.whole:
        raise InputError(f"constraint {counted}: the model has none; use another constraint")
    else:
        check_options(anatomy, replace(options, ratio=0.0), planned=True)
        left, rest = constraint, options
        if narrowest is not None:
            left, rest = constraint.narrowed(narrowest), under(constraint, options, narrowest)
        _check_ratio(left, rest)
    if narrowest in (None, anatomy.hidden_size) and not _masked(constraint, options):
        raise InputError("nothing may be pruned: axes, keep, floors and the target leave every block a single size")


def _check_ratio(constraint: Constraint, options: PruneOptions) -> None:
    ratio, allowed = constraint.ratio(options.ratio), sizes_under(constraint, options)
    check_ratio(constraint.anatomy, ratio, allowed, constraint.cost, constraint.name)


def _check_measured(constraint: Constraint, options: PruneOptions) -> None:
    """Refuse an axis along which blocks may become smaller, but no such size was measured. Raises InputError."""
    possible, measured = sizes_allowed(constraint.anatomy, options), sizes_under(constraint, options)
    for name in options.axes:
        kind, part, _ = AXES[name]
        blocks = constraint.anatomy.of_kind(kind)

        def shrinks(sizes: Sizes, blocks: Sequence[Block] = blocks, part: str = part) -> bool:
            pairs = ((block, size) for block in blocks for size in sizes[block.name])
            return any(size.units and getattr(size, part) < getattr(block, part) for block, size in pairs)

        if shrinks(possible) and not shrinks(measured):
            raise InputError(
                f"axes: the timings have no {kind} with fewer {name}; leave out {name}, or measure more sizes "
                "(numprune timings --sizes)"
            )


def learn(
    model: PreTrainedModel,
    rows: Tensor,
    selection: Tensor,
    options: PruneOptions,
    variant: Variant,
    tokens: int,
    task: Task = CAUSAL,
    *,
    counted: Counted = "parameters",
    learning_rate: float = LEARNING_RATE,
    state: TrainingState | None = None,
) -> Learned:
    """Train masks on `model` at the ratio or a budget of `options`. The model passed in is not modified.

    Args:
        model: a supported one in float32, with the attention implementation of its family.
        rows: (N, S) int64 for training, in this order and repeatedly; from `Task.calibration_rows`.
        selection: (n, S) other rows, for evaluation.
        options: what to remove, by the criterion "vib".
        variant: "faster" trains only masks, "full" and "fast" also the weights; these two differ only in the tokens.
        tokens: to train on, rounded up to whole steps.
        task: of the model.
        counted: the cost of which `options.ratio` is a share. The plan's own ratio always refers to parameters.
            "bytes" needs a budget in place of the ratio, and "milliseconds" a budget of time.
        learning_rate: initial one of the weights.
        state: for resuming, saved ten times during training. On a CPU, the result is bit-identical whether or not a
            process was killed and resumed.

    Raises:
        InputError: like `check_learning`, a learning rate that is negative or not finite, or rows that do not fit the
            model.
        IntegrityError: the training diverges.
    """
    anatomy = read_anatomy(model.config)
    check_learning(anatomy, options, counted, rows.shape[1])
    if not 0 <= learning_rate < math.inf:
        raise InputError(f"learning_rate is {learning_rate:g}; it must be at least 0, and finite")
    for some in (rows, selection):
        check_rows(anatomy, some)
    student = model if variant == "faster" else copy.deepcopy(model)
    constraint = Constraint(counted, anatomy, rows.shape[1], options.budget or options.time_budget)
    writing = tuple(block for block in anatomy.blocks if block.units)
    stream = Stream(anatomy.hidden_size, constraint.of_coordinate, writing) if HIDDEN_SIZE in options.axes else None
    masks = Masks(_masked(constraint, options), options.seed, stream).to(model.device)
    asked = replace(options, ratio=constraint.ratio(options.ratio), budget=None, time_budget=None)
    training = Training(model, student, constraint, masks, rows, selection, asked, task, tokens, learning_rate)
    best = training.run(state)
    sizes, coordinates = best.choice.sizes, best.choice.coordinates
    hidden = None if coordinates is None else HiddenPlan(size=anatomy.hidden_size, kept=coordinates.tolist())
    record = Record(
        variant=variant,
        steps=training.steps,
        tokens=training.tokens,
        seconds=training.seconds,
        best_step=best.step,
        constraint=counted,
        removed=constraint.removed(sizes, best.choice.hidden_size),
        kept=best.share,
        divergence=best.divergence,
        unit=task.unit,
        hidden_size=(len(hidden.kept), hidden.size) if hidden else None,
    )
    planned = {block.name: BlockPlan.of(block, best.choice.kept[block.name], None) for block in anatomy.blocks}
    if counted in ("flops", "kv-bytes"):
        parameters = Constraint("parameters", anatomy, rows.shape[1])
        options = replace(options, ratio=parameters.removed(sizes, best.choice.hidden_size))
    plan = describe(anatomy, rows, options, planned, hidden=hidden)
    if student is model:
        return Learned(plan, None, record)
    values = masks.at_leaves(masks.mean)
    fold(student.get_submodule(anatomy.layers_path), masks, values)
    if stream is not None:
        fold_stream(student, anatomy, masks.of_stream(values))
    return Learned(plan, student, record)


def _masked(constraint: Constraint, options: PruneOptions) -> list[Masked]:
    """Return the blocks that may or, for the target, must become smaller, with masks on everything removable."""
    allowed = sizes_under(constraint, options)
    return [
        Masked(
            block,
            constraint.of_unit(block),
            constraint.of_member(block),
            by_members=any(size.units and size.members < block.members for size in allowed[block.name]),
            as_a_whole=GONE in allowed[block.name],
        )
        for block in constraint.anatomy.blocks
        if block.units and allowed[block.name] != [block.size]
    ]
