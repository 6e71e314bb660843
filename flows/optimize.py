"""The whole chain as a Prefect flow: rows, pruning, exports, parity, quality, benchmark, gate, publication.

Each task is one stage. Prefect sees paths, digests and figures only; what has been done already is for the stages to
know, so no task caches. Deploy it as `flows/optimize.py:optimize`.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
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

from numprune.flows import children, recipe, runs, server, stages, summary, tracing
from numprune.flows.bundle import make_release
from numprune.flows.chain import judge
from numprune.flows.run import Run, prepare
from numprune.flows.runs import Recording
from numprune.flows.stages import Stage, StageResult
from numprune.flows.steps import publish as publishing
from numprune.flows.steps.results import Answers, Judgement, Timings

logger = logging.getLogger(__name__)

R = TypeVar("R")

GPU_LIMIT = "gpu"  # Prefect's global concurrency limit: one job on the GPU at a time


@flow(name="numprune-optimize", persist_result=False)
def optimize(
    recipe_path: str | None = None, overrides: list[str] | None = None, workspace: str | None = None
) -> State[dict[str, Any]]:
    """Run a recipe: a gated, published release, or the reason why there is none.

    Args:
        recipe_path: a recipe in TOML; the embedded default without it.
        overrides: `section.key=value` each.
        workspace: the folder of stages, releases and registry; `numprune-workspace` without it.

    Returns:
        Completed, or Failed when a gate did not pass; in both cases with what `summary.summarize` gives.
    """
    server.bind_to_this_process()
    run = check(recipe_path, overrides or [], workspace)
    stages.sweep(run.workspace)
    source = Path(recipe_path) if recipe_path else recipe.EMBEDDED_RECIPE
    with (
        runs.recording(run.workspace, run.recipe, source) as recording,
        tracing.run("optimize", run=recording.run, recipe=run.recipe.digest, name=run.recipe.registry.name) as watched,
    ):
        found = _chain(replace(run, record=recording.folder), recording)
        watched.set(outcome=found["outcome"], version=found["version"])
    if found["outcome"] == "pass":
        return Completed(message=f"published {found['version']}", data=found)
    return Failed(message=summary.refusal(found), data=found)


def _chain(run: Run, recording: Recording) -> dict[str, Any]:
    """Every stage of a run, and what `summary.summarize` gives of them."""
    done: list[StageResult[Any]] = []

    def make(stage: Stage[R]) -> StageResult[R]:
        result = task(name=stage.name, cache_policy=NO_CACHE, persist_result=False)(_make)(run, stage)
        done.append(result)
        recording.add(result)
        return result

    judged = judge(run, make)
    outcome = judged.report.facts.outcome
    release = version = None
    if outcome == "pass":
        release, version = publish(run, judged.parts, judged.report, judged.answers)
    _discard_disturbed(judged.looks.values())
    recording.judged(outcome, judged.report.path, release, version)
    found = summary.summarize(recording.run, judged.report.path, done, release, version, _location(run))
    _show(judged.report.path, found)
    return found


# --- tasks ----------------------------------------------------------------------------------------


@task(cache_policy=NO_CACHE, persist_result=False)
def check(recipe_path: str | None, overrides: list[str], workspace: str | None) -> Run:
    """The recipe, found to be one that can be done here."""
    asked = recipe.load(Path(recipe_path) if recipe_path else recipe.EMBEDDED_RECIPE, overrides)
    return children.call(prepare, asked, stages.workspace_folder(workspace))


def _make(run: Run, stage: Stage[R]) -> StageResult[R]:
    with gpu_slot() if run.uses_gpu and stage.uses_gpu else nullcontext():
        return run.make(stage)


@task(cache_policy=NO_CACHE, persist_result=False)
def publish(
    run: Run, parts: Mapping[str, Path], judged: StageResult[Judgement], answers: StageResult[Answers] | None
) -> tuple[Path, str]:
    """The release folder, and the version of the registry that it became."""
    answers_folder = answers.path if answers else None
    release = make_release(run.workspace, run.recipe, parts, judged.path, answers_folder, run.record)
    registry = run.recipe.registry
    return release, children.call(publishing.publish, run.workspace, registry.uri, release, registry.name)


# --- details --------------------------------------------------------------------------------------


def _location(run: Run) -> list[str]:
    """The options with which a command finds this run's registry."""
    uri = run.recipe.registry.uri
    return ["--workspace", str(run.workspace), *([] if uri == "workspace" else ["--uri", uri])]


def _discard_disturbed(benchmarks: Iterable[Sequence[StageResult[Timings]]]) -> None:
    """Forget what was measured in an invalid environment: it counts as no look, and the next run takes it again."""
    for *_, last in benchmarks:
        if not last.facts["environment"]["valid"]:
            stages.discard(last)


@contextmanager
def gpu_slot() -> Iterator[None]:
    """Hold the one slot of the GPU. A killed run's slot comes back when its lease ends."""
    # A limit that is there keeps its number of slots: somebody chose it.
    with get_client(sync_client=True) as client, suppress(ObjectAlreadyExists):
        client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=GPU_LIMIT, limit=1))
    with concurrency(GPU_LIMIT, strict=True, lease_duration=60):
        yield


def _show(judged: Path, found: Mapping[str, Any]) -> None:
    """The summary and the report in Prefect's UI."""
    create_markdown_artifact(
        markdown=summary.markdown(found), key="numprune-summary", description="Sizes, quality, speed, verdict, times"
    )
    text, page = (judged / "report.md").read_text(encoding="utf-8"), judged / "report.html"
    create_markdown_artifact(markdown=text, key="numprune-report", description="The report")
    create_link_artifact(link=page.absolute().as_uri(), link_text="report.html", key="numprune-report-link")
