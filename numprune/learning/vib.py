"""Masks that learn which units a model can do without: the variational information bottleneck at a given size.

Minimized over the masks and, where they are trained, the weights (VTrans, arXiv 2406.05276; TVA-Prune, whose code is
github.com/oshindutta/TVAprune):

    D + beta * sum_k w_k * 1/2 log(1 + mu_k^2 / sigma_k^2) + l1 (s - t) + l2 (s - t)^2

D is the task's divergence of the masked model from the dense one (for language models the KL divergence of their
distributions). The papers have the loss on labels there; D needs none, so it serves every task, and it is 0 where every
mask is 1. w_k is what the unit costs in parameters relative to the cheapest unit, s the share of the prunable
parameters that the masks keep, and t the share that they may: it falls linearly from 1 over the first steps. l1 and l2
are found by gradient ascent, in units of what it costs to remove units at random: so they suit every task's loss.

Once t has fallen, the masks are rounded several times to sizes that meet the budget, and what is then left is judged by
D on rows that nothing was trained on. The best of these is the result; masks that meet the budget by themselves come
before those that rounding alone makes to.
"""

import copy
import logging
import math
import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from numprune.anatomy import read_anatomy
from numprune.axes import AXES
from numprune.blocks import Anatomy, Block
from numprune.calibration import check_rows
from numprune.errors import InputError
from numprune.learning.constraint import Lagrangian, cost_of
from numprune.learning.masks import Masks, fold, masked
from numprune.learning.rounding import ALLOCATIONS, rounded
from numprune.options import PruneOptions, check_options, sizes_allowed
from numprune.plans import BlockPlan, Plan
from numprune.progress import Progress
from numprune.pruning import describe
from numprune.slices import Kept
from numprune.tasks import CAUSAL, Task

logger = logging.getLogger(__name__)

Variant = Literal["full", "fast", "faster"]

SELECTION_ROWS = 16
LEARNING_RATE = 1e-4

_TOKENS_PER_STEP = 512
_JUDGED = 6  # times that the masks are rounded and judged
_WARM_UP = 0.4  # share of the steps in which the target falls
_BETA = 1e-6
_MASK_RATE = 0.05  # AdamW's, as `LEARNING_RATE`; both fall linearly to a tenth
_ASCENT_RATE, _QUADRATIC = 0.1, 10.0  # of the multipliers
_CLIP = 1.0  # norm of the weights' gradient
_BAND = 0.01  # by which the share that masks keep may miss the target


@dataclass(frozen=True)
class Record:
    """How masks were learned.

    Attributes:
        variant: of the method.
        steps, tokens, seconds: of the training.
        best_step: whose masks were taken.
        kept: share of the prunable parameters that the masks kept then by themselves, before they were rounded.
        divergence: of what is left from the dense model on the selection rows, before anything is refitted.
        unit: of the divergence.
    """

    variant: Variant
    steps: int
    tokens: int
    seconds: float
    best_step: int
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


def check_learning(anatomy: Anatomy, options: PruneOptions) -> None:
    """Refuse what cannot work before anything is run.

    Raises:
        InputError: as `check_options`, or the options ask for something that masks do not learn.
    """
    if options.drop_layers:
        raise InputError("drop_layers: masks learn units, not layers; drop layers with numprune prune")
    axes = {name: AXES[name] for name in options.axes if name in AXES}
    if members := [name for name, axis in axes.items() if axis.part == "members" and axis.kind in anatomy.kinds]:
        raise InputError(f"axes: masks are on whole units; leave out {', '.join(members)}")
    if options.allocation not in ALLOCATIONS:
        raise InputError(f"allocation is {options.allocation!r}; masks are rounded by one of {', '.join(ALLOCATIONS)}")
    check_options(anatomy, options, planned=True)
    if not _with_a_choice(anatomy, options):
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
    learning_rate: float = LEARNING_RATE,
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
        learning_rate: of the weights, at first.

    Raises:
        InputError: as `check_learning`, a learning rate that is negative or not finite, rows that are not this model's,
            or the training diverges.
    """
    anatomy = read_anatomy(model.config)
    check_learning(anatomy, options)
    if not 0 <= learning_rate < math.inf:
        raise InputError(f"learning_rate is {learning_rate:g}; it must be at least 0, and finite")
    for some in (rows, selection):
        check_rows(anatomy, some)
    student = model if variant == "faster" else copy.deepcopy(model)
    masks = Masks(_with_a_choice(anatomy, options), options.seed).to(model.device)
    run = _Run(model, student, anatomy, masks, options, task)
    started = time.monotonic()
    batch = max(1, _TOKENS_PER_STEP // rows.shape[1])
    steps = -(-tokens // (batch * rows.shape[1]))
    best = run.train(rows, selection, batch, steps, learning_rate)
    record = Record(
        variant=variant,
        steps=steps,
        tokens=steps * batch * rows.shape[1],
        seconds=time.monotonic() - started,
        best_step=best.step,
        kept=best.share,
        divergence=best.divergence,
        unit=task.unit,
    )
    blocks = {block.name: BlockPlan.of(block, best.kept[block.name], None) for block in anatomy.blocks}
    plan = describe(anatomy, rows, options, blocks)
    if student is model:
        return Learned(plan, None, record)
    student.load_state_dict(best.weights)
    masks.load_state_dict(best.masks)
    fold(student.get_submodule(anatomy.layers_path), masks, masks.mean)
    return Learned(plan, student, record)


def _with_a_choice(anatomy: Anatomy, options: PruneOptions) -> list[Block]:
    allowed = sizes_allowed(anatomy, options)
    return [block for block in anatomy.blocks if len(allowed[block.name]) > 1]


@dataclass(frozen=True)
class _Judged:
    """Masks, rounded.

    Attributes:
        in_band: they meet the budget by themselves, within `_BAND`.
        weights: of the model at that step; empty where they are not trained.
    """

    step: int
    in_band: bool
    share: float
    divergence: float
    kept: dict[str, Kept]
    masks: dict[str, Tensor]
    weights: dict[str, Tensor]


class _Run:
    """One training of masks on `student`, whose weights are trained too where it is not `dense` itself."""

    def __init__(
        self,
        dense: PreTrainedModel,
        student: PreTrainedModel,
        anatomy: Anatomy,
        masks: Masks,
        options: PruneOptions,
        task: Task,
    ) -> None:
        self._dense, self._student, self._masks, self._task = dense, student, masks, task
        self._anatomy, self._options = anatomy, options
        self._layers = student.get_submodule(anatomy.layers_path)
        self._cost = cost_of(anatomy, masks)
        self._weights = [] if student is dense else list(student.parameters())

    def train(self, rows: Tensor, selection: Tensor, batch_size: int, steps: int, learning_rate: float) -> _Judged:
        """Make so many steps, each on the next `batch_size` rows, and return the best masks."""
        device = self._dense.device
        warm = max(1, round(_WARM_UP * steps))
        judged_at = {round(warm + (steps - warm) * part / _JUDGED) for part in range(1, _JUDGED + 1)}
        groups = [{"params": [*self._masks.parameters()], "lr": _MASK_RATE}]
        if self._weights:
            groups.append({"params": self._weights, "lr": learning_rate})
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=steps)
        draw = torch.Generator().manual_seed(self._options.seed)
        scale = self._divergence(self._at_random(), selection.to(device))
        lagrangian = Lagrangian(_ASCENT_RATE * scale, _QUADRATIC * scale)
        best: _Judged | None = None
        with Progress(steps, "learn", "step") as bar:
            for step in range(1, steps + 1):
                batch = rows[torch.arange((step - 1) * batch_size, step * batch_size) % len(rows)]
                target = 1 - self._options.ratio * min(1.0, step / warm)
                excess = self._step(batch.to(device), target, lagrangian, optimizer, draw)
                schedule.step()
                lagrangian.ascend(excess)
                bar.update()
                if step in judged_at:
                    found = self._judge(step, selection.to(device))
                    best = min((one for one in (best, found) if one), key=lambda one: (not one.in_band, one.divergence))
        assert best is not None
        if not best.in_band:
            logger.warning(
                "the masks by themselves keep %.1f %% of the prunable parameters instead of %.1f %%, and were rounded; "
                "train on more tokens",
                100 * best.share,
                100 * (1 - self._options.ratio),
            )
        return best

    def _step(
        self,
        batch: Tensor,
        target: float,
        lagrangian: Lagrangian,
        optimizer: torch.optim.Optimizer,
        draw: torch.Generator,
    ) -> float:
        """Make a step on rows (n, S); return by how much the masks keep more than `target`."""
        with torch.no_grad():
            dense = self._output(self._dense, batch)
        with masked(self._layers, self._masks, self._masks.sample(len(batch), draw)):
            loss = self._task.divergence(self._output(self._student, batch), dense, batch).mean()
        if not torch.isfinite(loss):
            raise InputError("the loss is not finite any more: the training diverged; choose a smaller learning rate")
        excess = self._cost.kept(self._masks) - target
        bottleneck = _BETA * (self._masks.weights @ self._masks.information)
        trained = [*self._masks.parameters(), *self._weights]
        gradients = torch.autograd.grad(loss + bottleneck + lagrangian.penalty(excess), trained, allow_unused=True)
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.grad = gradient
        if self._weights:
            torch.nn.utils.clip_grad_norm_(self._weights, _CLIP)
        optimizer.step()
        return excess.item()

    @torch.no_grad()
    def _judge(self, step: int, selection: Tensor) -> _Judged:
        """Round the masks and judge what is left; trained weights are left with their masks, others without."""
        masks = self._masks
        kept = rounded(self._anatomy, masks, self._options)
        left = masks.indicator(kept) * (masks.mean if self._weights else 1)
        divergence, share = self._divergence(left, selection), float(self._cost.kept(masks))
        logger.info(
            "step %d: the masks keep %.1f %% of the prunable parameters; %.4f %s from the dense model once rounded",
            step,
            100 * share,
            divergence,
            self._task.unit,
        )
        weights = {name: value.clone() for name, value in self._student.state_dict().items()} if self._weights else {}
        in_band = abs(share - 1 + self._options.ratio) <= _BAND
        return _Judged(step, in_band, share, divergence, kept, copy.deepcopy(masks.state_dict()), weights)

    def _at_random(self) -> Tensor:
        """Return masks (U,) that leave every unit with the same chance, `ratio` of them none."""
        draw = torch.Generator().manual_seed(self._options.seed)
        chances = torch.rand(len(self._masks.weights), generator=draw).to(self._masks.weights)
        return (chances >= self._options.ratio).to(chances)

    @torch.no_grad()
    def _divergence(self, values: Tensor, rows: Tensor) -> float:
        """Return how far the model with masks (U,) is from the dense one on rows (n, S), for each prediction."""
        found = []
        for batch in rows.split(max(1, _TOKENS_PER_STEP // rows.shape[1])):
            with masked(self._layers, self._masks, values[None]):
                output = self._output(self._student, batch)
            found.append(self._task.divergence(output, self._output(self._dense, batch), batch))
        return float(torch.cat(found).mean())

    def _output(self, model: PreTrainedModel, rows: Tensor) -> Tensor:
        return self._task.output(model, rows, torch.ones_like(rows))
