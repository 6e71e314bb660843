"""One run of a recipe: what is the same for all of its stages."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from numprune.flows import children, logs, tracing
from numprune.flows.recipe import Recipe
from numprune.flows.stages import Artifact, Stage, StageResult, Text, run_stage

R = TypeVar("R")

logger = logging.getLogger(__name__)


def prepare(recipe: Recipe, workspace: Path) -> "Run":
    """Return the run of a recipe that can be done here. Raises InputError with every problem."""
    from numprune.flows.steps import checks  # the tensor libraries

    return checks.prepare(recipe, workspace)


@dataclass(frozen=True)
class Run:
    """A recipe that can be done here, and where its stages stand.

    Attributes:
        base: the model; `task`: what it is for.
        calibration, heldout: the recipe's text.
        device: on which the model is calibrated and evaluated, cpu or cuda.
        uses_gpu: anything at all runs on a GPU.
        precision: what each runtime that is exported for or benchmarked computes in, on both sides.
        machine: where timings are taken.
        record: the folder in which the run is recorded.
    """

    recipe: Recipe
    workspace: Path
    base: Artifact
    task: str
    calibration: Text
    heldout: Text
    device: str
    uses_gpu: bool
    precision: dict[str, str]
    machine: dict[str, str]
    record: Path | None = None

    def make(self, stage: Stage[R]) -> StageResult[R]:
        """Return a stage, made in a process of its own unless it is there."""
        with logs.within(stage=stage.label), tracing.stage(stage.label) as span:
            result = children.call(run_stage, self.workspace, stage, self.record)
            span.found(result)
            logger.info("%-24s %6.1f s%s", result.name, result.seconds, "  reused" if result.reused else "")
        return result
