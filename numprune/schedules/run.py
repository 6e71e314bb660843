"""The state of one training with gradual pruning."""

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from numprune.allocation import global_sort, keep_highest, uniform
from numprune.blocks import Anatomy
from numprune.budget import budget_of
from numprune.errors import InputError
from numprune.options import PruneOptions, sizes_allowed
from numprune.plans import BlockPlan, Plan
from numprune.pruning import describe
from numprune.schedules.bottleneck import Bottleneck
from numprune.schedules.ramp import Pace, Ramp
from numprune.schedules.scores import Magnitude, Movement, Scores
from numprune.schedules.units import Units
from numprune.slices import Kept, Size
from numprune.target import nearest


@dataclass
class Losses:
    """The training losses logged since the last removal.

    Attributes:
        total: their sum over steps.
        steps: number of steps.
        logged: the last step included.
    """

    total: float = 0.0
    steps: int = 0
    logged: int = 0

    def add(self, mean: float, step: int) -> None:
        """Add the mean of the steps since the last call."""
        self.total += mean * (step - self.logged)
        self.steps += step - self.logged
        self.logged = step

    def take(self) -> float:
        """Return the mean, and start again."""
        mean = self.total / self.steps if self.steps else math.nan
        self.total, self.steps = 0.0, 0
        return mean


@dataclass
class Run:
    """The state of one training.

    Attributes:
        options: ratio, allocation, limits and target.
        settings: everything that determines what is removed, for comparison with a checkpoint's.
        steps, seed: of the training.
        waits_for_loss: it is time to prune, and the loss that decides is not known yet.
    """

    layers: Sequence[nn.Module]
    anatomy: Anatomy
    options: PruneOptions
    ramp: Ramp
    settings: Mapping[str, Any]
    steps: int
    seed: int
    pace: Pace = field(default_factory=Pace)
    losses: Losses = field(default_factory=Losses)
    waits_for_loss: bool = False

    def __post_init__(self) -> None:
        self._allowed = sizes_allowed(self.anatomy, self.options)
        blocks = [block for block in self.anatomy.blocks if len(self._allowed[block.name]) > 1]
        if not blocks:
            raise InputError("nothing may be pruned: axes, keep, floors and the target leave every block a single size")
        criterion = self.options.criterion
        self.units = Units(self.layers, blocks, gradients=criterion != "magnitude")
        self.scores: Scores
        if criterion == "vib":
            self.scores = Bottleneck(self.units, self.anatomy, self.steps, self.seed)
        else:
            self.scores = Movement(self.units) if criterion == "movement" else Magnitude(self.units)

    def begin_step(self, step: int) -> None:
        """Set the masks for training step `step`, counted from 1."""
        self.units.multiply(self.scores.factors(step))

    def collect(self, step: int) -> None:
        """Take in the gradients of a step."""
        following = min(self.pace.done + 1, self.ramp.times)
        self.scores.collect(step, 1 - self.ramp.share(following) * self.options.ratio)

    def settle(self) -> None:
        """Set the masks for evaluation."""
        self.units.multiply(self.scores.factors(None))

    def go_on(self, step: int) -> None:
        """Remove what is due."""
        self.pace.done += 1
        self._prune(step)

    def judge(self, loss: float, tolerance: float, step: int) -> None:
        """Remove what is due, wait, or undo the last removal."""
        self.waits_for_loss = False
        if not math.isfinite(loss):
            raise InputError(f"training diverged by step {step}: the loss is {loss:g}; lower the learning rate")
        before = self.pace.done
        self.pace.next(self.ramp, loss, tolerance)
        if self.pace.done != before:
            self._prune(step)

    def _prune(self, step: int) -> None:
        scores = self.units.by_block(self.scores.scores(step))
        sizes = self._sizes(scores)
        self.units.keep({name: keep_highest(score, sizes[name].units) for name, score in scores.items()})
        self.settle()

    def _sizes(self, scores: Mapping[str, Tensor]) -> dict[str, Size]:
        share = self.ramp.share(self.pace.done)
        if self.pace.done == 0:
            return {block.name: block.size for block in self.anatomy.blocks}
        if self.options.allocation == "global":
            fixed = {block.name: torch.zeros(block.units) for block in self.anatomy.blocks}
            return global_sort(self.anatomy, share * self.options.ratio, self._allowed, fixed | dict(scores))
        final, sizes = uniform(self.anatomy, self.options.ratio, self._allowed), {}
        for block in self.anatomy.blocks:
            by_units = {size.units: size for size in self._allowed[block.name]}
            exact = block.units - share * (block.units - final[block.name].units)
            sizes[block.name] = by_units[nearest([*by_units], exact)]
        return sizes

    def removed(self) -> float:
        """Return the share of the prunable parameters that is removed."""
        left = self.anatomy.keeping({name: kept.size for name, kept in self._kept().items()})
        return 1 - budget_of(left).prunable_parameters / budget_of(self.anatomy).prunable_parameters

    def plan(self) -> Plan:
        """Return the plan of the remaining units, with the ratio that was reached."""
        reached = self.pace.done == self.ramp.times
        options = self.options if reached else replace(self.options, ratio=self.removed())
        kept = self._kept()
        blocks = {block.name: BlockPlan.of(block, kept[block.name], None) for block in self.anatomy.blocks}
        return describe(self.anatomy, torch.zeros(0, 0, dtype=torch.long), options, blocks)  # calibrated on nothing

    def _kept(self) -> dict[str, Kept]:
        units = {block.name: torch.arange(block.units) for block in self.anatomy.blocks} | self.units.kept()
        return {block.name: Kept.whole(units[block.name], block.members) for block in self.anatomy.blocks}

    def state(self) -> dict[str, Any]:
        """Return everything that the next step depends on, as JSON."""
        tensors = base64.b64encode(save(self.units.state() | self.scores.state())).decode()
        return {"settings": self.settings, "pace": asdict(self.pace), "losses": asdict(self.losses), "tensors": tensors}

    def restore(self, stored: Mapping[str, Any], step: int) -> None:
        """Resume from what `state` returned, after `step` steps.

        Raises:
            InputError: it belongs to a training with other settings; names them. Or another version wrote it.
        """
        ours = json.loads(json.dumps(self.settings))
        for name, value in ours.items():
            found = stored["settings"].get(name)
            if found != value:
                raise InputError(
                    f"the checkpoint to resume from was trained with {_named(name, found)}, and this training has "
                    f"{_named(name, value)}; use the same settings, or start again"
                )
        if "tensors" not in stored:
            raise InputError("the checkpoint to resume from was written by an earlier version of numprune; start again")
        self.pace = Pace(**stored["pace"])
        self.losses = replace(Losses(**stored["losses"]), logged=step)
        tensors = load(base64.b64decode(stored["tensors"]))
        self.units.restore(tensors)
        self.scores.restore(tensors)


def _named(name: str, value: Any) -> str:
    return f"other {name}" if isinstance(value, dict) else f"{name} {value}"
