"""One run of a recipe: the context shared by its stages."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from numprune.flows import children, logs, tracing
from numprune.flows.recipe import Recipe
from numprune.flows.stages import Artifact, Stage, StageResult, Text, run_stage
from numprune.hidden import Width

R = TypeVar("R")

logger = logging.getLogger(__name__)


def prepare(recipe: Recipe, workspace: Path) -> "Run":
    """Check a recipe and return its run. Raises InputError with every problem."""
    from numprune.flows.steps import prepare as preparing  # the tensor libraries

    return preparing.prepare(recipe, workspace)


@dataclass(frozen=True)
class Run:
    """A checked recipe and the context of its stages.

    Attributes:
        base: the model; `task`: its task; `served`: a server can run it.
        calibration: the recipe's text; `heldout`: of each corpus, by its name, the first one first.
        prompts: files that the dense model answers for the training; None: it does not.
        image_tokens: of every image, for a model that reads images.
        tasks: the recipe's tasks, if any; their digest is that of every request to a model.
        decoder: the file that turns an image generator's codes into pictures, if any.
        fid_network: the network that compares these with the real images `fid_images`, if any.
        device: for calibration and evaluation, cpu or cuda.
        uses_gpu: whether anything runs on a GPU.
        precision: compute precision by runtime, for exports and both sides of benchmarks.
        machine: description of the machine that timings depend on.
        timing_keys: hidden size of the result, or None for the model's own -> what a table of block latencies measured
            now would be valid for; empty without a budget of time.
        record: the folder of the run's record.
        candidates: how many this one is chosen among (see numprune.serving.gates).
    """

    recipe: Recipe
    workspace: Path
    base: Artifact
    task: str
    served: bool
    calibration: Text
    heldout: Mapping[str, Text]
    prompts: Text | None
    device: str
    uses_gpu: bool
    precision: dict[str, str]
    machine: dict[str, str]
    timing_keys: Mapping[Width | None, str] = field(default_factory=dict)
    tasks: Text | None = None
    decoder: Text | None = None
    fid_network: Text | None = None
    fid_images: Text | None = None
    image_tokens: int | None = None
    record: Path | None = None
    candidates: int = 1

    def make(self, stage: Stage[R]) -> StageResult[R]:
        """Return a stage, computed in its own process if missing."""
        with logs.within(stage=stage.label), tracing.stage(stage.label) as span:
            result = children.call(run_stage, self.workspace, stage, self.record)
            span.found(result)
            logger.info("%-24s %6.1f s%s", result.name, result.seconds, "  reused" if result.reused else "")
        return result
