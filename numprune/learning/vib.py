"""Masks that learn which units a model can do without: the variational information bottleneck at a given size.

Minimized over the masks and, where they are trained, the weights (VTrans, arXiv 2406.05276; TVA-Prune, whose code is
github.com/oshindutta/TVAprune):

    D + beta * sum_k w_k * 1/2 log(1 + mu_k^2 / sigma_k^2) + l1 (s - t) + l2 (s - t)^2

D is the task's divergence of the masked model from the dense one (for language models the KL divergence of their
distributions). The papers have the loss on labels there; D needs none, so it serves every task, and it is 0 where every
mask is 1. s is the share that the masks keep of what the constraint counts (the prunable parameters, FLOPs or bytes of
the KV cache), w_k what the unit costs of it relative to the cheapest unit, and t the share that may be kept: it falls
linearly from 1 over the first steps. l1 and l2 are found by gradient ascent, in units of what it costs to remove units
at random: so they suit every task's loss.

Once t has fallen, the masks are rounded several times to sizes that meet the budget, and what is then left is judged by
D on rows that nothing was trained on. The best of these is the result; masks that meet the budget by themselves come
before those that rounding alone makes to.
"""

import copy
import math
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor
from transformers import PreTrainedModel

from numprune.allocation import check_ratio
from numprune.anatomy import read_anatomy
from numprune.blocks import Anatomy
from numprune.calibration import check_rows
from numprune.errors import InputError
from numprune.learning.constraint import Constraint, Counted
from numprune.learning.masks import Masked, Masks, fold
from numprune.learning.rounding import ALLOCATIONS, sizes_under
from numprune.learning.training import Training
from numprune.options import PruneOptions, check_options
from numprune.plans import BlockPlan, Plan
from numprune.pruning import describe
from numprune.recovery.state import TrainingState
from numprune.slices import GONE
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
        best_step: whose masks were taken.
        constraint: what was counted.
        removed: share of it that the plan removes.
        kept: share of it that the masks kept by themselves, before they were rounded.
        divergence: of what is left from the dense model on the selection rows, before anything is refitted.
        unit: of the divergence.
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


@dataclass(frozen=True)
class Learned:
    """What was learned.

    Attributes:
        plan: says what to keep of `model` or, where that is None, of the model that was given.
        model: with its trained weights, the masks folded into them; None where only masks were trained.
        record: of the training.
    """

    plan: Plan
    model: PreTrainedModel | None
    record: Record


def check_learning(anatomy: Anatomy, options: PruneOptions, counted: Counted = "parameters", length: int = 1) -> None:
    """Refuse what cannot work before anything is run; `counted` and `length` as of `Constraint`.

    Raises:
        InputError: as `check_options`, or the options ask for something that masks do not learn.
    """
    if options.budget is not None:
        raise InputError("budget: masks are trained for a ratio; give a ratio instead")
    if options.drop_layers:
        raise InputError("drop_layers: masks learn units, not layers; drop layers with numprune prune")
    if "expert-channels" in options.axes and "experts" in anatomy.kinds:
        raise InputError("axes: masks are on whole experts; leave out expert-channels")
    if options.allocation not in ALLOCATIONS:
        raise InputError(f"allocation is {options.allocation!r}; masks are rounded by one of {', '.join(ALLOCATIONS)}")
    constraint = Constraint(counted, anatomy, length)
    if counted == "parameters":
        check_options(anatomy, options, planned=True)
    elif options.allocation == "uniform":
        raise InputError(f"allocation is 'uniform', which splits parameters; use error with the constraint {counted}")
    elif not constraint.whole:
        raise InputError(f"constraint {counted}: the model has none; use another constraint")
    else:
        check_options(anatomy, replace(options, ratio=0.0), planned=True)
        check_ratio(anatomy, options.ratio, sizes_under(constraint, options), constraint.cost, constraint.name)
    if not _masked(constraint, options):
        raise InputError("nothing may be pruned: axes, keep, floors and the target leave every block a single size")


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
    """Return what masks on `model` learn at `options.ratio`. The model passed in stays as it is.

    Args:
        model: a supported one in float32, with the attention that its family is walked with.
        rows: (N, S) int64 to train on, in this order, over and over again; from `Task.calibration_rows`.
        selection: (n, S) others, to judge by.
        options: what to remove, by the criterion "vib".
        variant: "faster" trains masks only, "full" and "fast" the weights too; these differ in the tokens only.
        tokens: to train on, rounded up to whole steps.
        task: that the model is for.
        counted: what `options.ratio` is a share of. The plan's own ratio is that of the parameters in any case.
        learning_rate: of the weights, at first.
        state: where to resume from, and to save to ten times on the way. On a CPU the result is the same bit for bit
            whether or not a process was killed and resumed.

    Raises:
        InputError: as `check_learning`, a learning rate that is negative or not finite, or rows that are not this
            model's.
        IntegrityError: the training diverges.
    """
    anatomy = read_anatomy(model.config)
    check_learning(anatomy, options, counted, rows.shape[1])
    if not 0 <= learning_rate < math.inf:
        raise InputError(f"learning_rate is {learning_rate:g}; it must be at least 0, and finite")
    for some in (rows, selection):
        check_rows(anatomy, some)
    student = model if variant == "faster" else copy.deepcopy(model)
    constraint = Constraint(counted, anatomy, rows.shape[1])
    masks = Masks(_masked(constraint, options), options.seed).to(model.device)
    training = Training(model, student, constraint, masks, rows, selection, options, task, tokens, learning_rate)
    best = training.run(state)
    sizes = {name: kept.size for name, kept in best.kept.items()}
    record = Record(
        variant=variant,
        steps=training.steps,
        tokens=training.tokens,
        seconds=training.seconds,
        best_step=best.step,
        constraint=counted,
        removed=constraint.removed(sizes),
        kept=best.share,
        divergence=best.divergence,
        unit=task.unit,
    )
    planned = {block.name: BlockPlan.of(block, best.kept[block.name], None) for block in anatomy.blocks}
    if counted != "parameters":
        options = replace(options, ratio=Constraint("parameters", anatomy, rows.shape[1]).removed(sizes))
    plan = describe(anatomy, rows, options, planned)
    if student is model:
        return Learned(plan, None, record)
    fold(student.get_submodule(anatomy.layers_path), masks, masks.at_leaves(masks.mean))
    return Learned(plan, student, record)


def _masked(constraint: Constraint, options: PruneOptions) -> list[Masked]:
    """Return the blocks that have a choice, with masks on all that may go."""
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
        if len(allowed[block.name]) > 1
    ]
