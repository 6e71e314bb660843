"""One run of a recipe: what is the same for all of its stages."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from numprune.flows import children, logs, tracing
from numprune.flows.recipe import Recipe
from numprune.flows.stages import Layer, StageResult, run_stage

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Artifact:
    """A folder that is measured or released, and its digest (see `manifest.folder_digest`)."""

    path: Path
    digest: str


@dataclass(frozen=True)
class Run:
    """A recipe that can be done here, and where its stages stand.

    Attributes:
        base: the model; `task`: what it is for.
        texts: digests of the recipe's text, "calibration" and "heldout".
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
    texts: dict[str, str]
    device: str
    uses_gpu: bool
    precision: dict[str, str]
    machine: dict[str, str]
    record: Path | None = None

    def stage(
        self,
        name: str,
        body: str,
        *,
        inputs: Mapping[str, str],
        sources: Mapping[str, object],
        options: Mapping[str, Any],
        layer: Layer,
        label: str = "",
    ) -> StageResult:
        """Return a stage, made in a process of its own unless it is there.

        Args:
            body: "module.function" of `numprune.flows` (see `children.find_step`); it gets the stage's folder, the
                sources and the options.
            inputs: digests of all that stands in `sources`.
            sources: where the body finds its inputs; no part of the stage's identity.
            options: the plain values that the body uses.
            label: what it is called in logs and tables, where the name is not enough.
        """
        label = label or name
        job = (self.workspace, name, body, dict(inputs), dict(sources), dict(options), layer, self.record)
        with logs.within(stage=label), tracing.stage(label) as span:
            result = replace(children.call(_in_child, *job), name=label)
            span.found(result)
            logger.info("%-24s %6.1f s%s", label, result.seconds, "  reused" if result.reused else "")
        return result


def _in_child(
    workspace: Path,
    name: str,
    body: str,
    inputs: dict[str, str],
    sources: dict[str, object],
    options: dict[str, Any],
    layer: Layer,
    record: Path | None,
) -> StageResult:
    work = partial(children.find_step(body), **sources, **options)
    return run_stage(workspace, name, inputs, options, work, layer, record)
