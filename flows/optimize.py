"""The pipeline as a Prefect flow: rows, pruning, exports, parity, quality, benchmark, gate, publication.

Each task is one stage. Prefect sees only paths, digests and figures. Stages are their own cache, so no task caches.
Deploy it as `flows/optimize.py:optimize`.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, TypeVar

from prefect import flow, task
from prefect.artifacts import create_link_artifact, create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectAlreadyExists
from prefect.states import Completed, Failed, State

from numprune.flows import children, execute, recipe, server, stages, summary
from numprune.flows.run import Run, prepare
from numprune.flows.stages import Stage, StageResult

logger = logging.getLogger(__name__)

R = TypeVar("R")

GPU_LIMIT = "gpu"  # Prefect's global concurrency limit: one GPU job at a time


@flow(name="numprune-optimize", persist_result=False)
def optimize(
    recipe_path: str | None = None, overrides: list[str] | None = None, workspace: str | None = None
) -> State[dict[str, Any]]:
    """Run a recipe to a published release, or to the reason why a gate blocks it.

    Args:
        recipe_path: a TOML recipe; by default the embedded one.
        overrides: `section.key=value` each.
        workspace: the folder of stages, releases and registry; by default `numprune-workspace`.

    Returns:
        Completed, or Failed if a gate did not pass; in both cases with the result of `summary.summarize`.
    """
    server.bind_to_this_process()
    run = check(recipe_path, overrides or [], workspace)
    found = execute.execute(run, recipe.source_of(recipe_path), make, publish)
    _show(found)
    if found["outcome"] == "pass":
        return Completed(message=f"published {found['version']}", data=found)
    return Failed(message=summary.refusal(found), data=found)


# --- tasks ----------------------------------------------------------------------------------------


@task(cache_policy=NO_CACHE, persist_result=False)
def check(recipe_path: str | None, overrides: list[str], workspace: str | None) -> Run:
    """Check that the recipe can run here."""
    asked = recipe.load(recipe.source_of(recipe_path), overrides)
    return children.call(prepare, asked, stages.workspace_folder(workspace))


publish = task(cache_policy=NO_CACHE, persist_result=False)(execute.publish)


def make(run: Run, stage: Stage[R]) -> StageResult[R]:
    """Return a stage, made by a task of its name."""
    return task(name=stage.name, cache_policy=NO_CACHE, persist_result=False)(_make)(run, stage)


def _make(run: Run, stage: Stage[R]) -> StageResult[R]:
    with gpu_slot() if run.uses_gpu and stage.uses_gpu else nullcontext():
        return run.make(stage)


# --- details --------------------------------------------------------------------------------------


@contextmanager
def gpu_slot() -> Iterator[None]:
    """Hold the GPU slot. A killed run's slot is freed when its lease ends."""
    # An existing limit keeps its number of slots, which a user may have set.
    with get_client(sync_client=True) as client, suppress(ObjectAlreadyExists):
        client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=GPU_LIMIT, limit=1))
    with concurrency(GPU_LIMIT, strict=True, lease_duration=60):
        yield


def _show(found: Mapping[str, Any]) -> None:
    """The summary and the report in Prefect's UI."""
    create_markdown_artifact(
        markdown=summary.markdown(found), key="numprune-summary", description="Sizes, quality, speed, verdict, times"
    )
    page = Path(found["page"])
    text = page.with_name("report.md").read_text(encoding="utf-8")
    create_markdown_artifact(markdown=text, key="numprune-report", description="The report")
    create_link_artifact(link=page.absolute().as_uri(), link_text="report.html", key="numprune-report-link")
