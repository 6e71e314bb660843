"""A run of a recipe from its first stage to the published release, recorded and traced.

Nothing here knows who schedules it: `execute` takes every stage by the `make` that it is given, in this process or as
Prefect's tasks (optimize.py).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from numprune.flows import children, runs, stages, summary, tracing
from numprune.flows.bundle import make_release
from numprune.flows.chain import judge
from numprune.flows.run import Run
from numprune.flows.runs import Recording
from numprune.flows.stages import Stage, StageResult
from numprune.flows.steps import publish as publishing
from numprune.flows.steps.results import Answers, Judgement, Timings

R = TypeVar("R")


class MakeStage(Protocol):
    """Gives a stage of a run, made unless it is there."""

    def __call__(self, run: Run, stage: Stage[R], /) -> StageResult[R]: ...


class Publish(Protocol):
    """Makes a release of the parts of a run and publishes it: see `publish`."""

    def __call__(
        self, run: Run, parts: Mapping[str, Path], judged: StageResult[Judgement], answers: StageResult[Answers] | None
    ) -> tuple[Path, str]: ...


def publish(
    run: Run, parts: Mapping[str, Path], judged: StageResult[Judgement], answers: StageResult[Answers] | None
) -> tuple[Path, str]:
    """Return the release folder, and the version of the registry that it became."""
    answers_folder = answers.path if answers else None
    release = make_release(run.workspace, run.recipe, parts, judged.path, answers_folder, run.record)
    registry = run.recipe.registry
    return release, children.call(publishing.publish, run.workspace, registry.uri, release, registry.name)


def execute(run: Run, source: Path, make: MakeStage = Run.make, publish: Publish | None = publish) -> dict[str, Any]:
    """Take every stage of a run, publish what passes, and return what `summary.summarize` gives.

    Args:
        source: the recipe's file, for the record.
        make: of single stages.
        publish: what passed; None: nothing is published.
    """
    stages.sweep(run.workspace)
    with (
        runs.recording(run.workspace, run.recipe, source) as recording,
        tracing.run("optimize", run=recording.run, recipe=run.recipe.digest, name=run.recipe.registry.name) as watched,
    ):
        found = _chain(replace(run, record=recording.folder), recording, make, publish)
        watched.set(outcome=found["outcome"], version=found["version"])
    return found


# --- details --------------------------------------------------------------------------------------


def _chain(run: Run, recording: Recording, make: MakeStage, publish: Publish | None) -> dict[str, Any]:
    done: list[StageResult[Any]] = []

    def take(stage: Stage[R]) -> StageResult[R]:
        result = make(run, stage)
        done.append(result)
        recording.add(result)
        return result

    judged = judge(run, take)
    outcome = judged.report.facts.outcome
    release = version = None
    if outcome == "pass" and publish is not None:
        release, version = publish(run, judged.parts, judged.report, judged.answers)
    _discard_disturbed(judged.looks.values())
    recording.judged(outcome, judged.report.path, release, version)
    return summary.summarize(recording.run, judged.report.path, done, release, version, _location(run))


def _location(run: Run) -> list[str]:
    """The options with which a command finds this run's registry."""
    uri = run.recipe.registry.uri
    return ["--workspace", str(run.workspace), *([] if uri == "workspace" else ["--uri", uri])]


def _discard_disturbed(benchmarks: Iterable[Sequence[StageResult[Timings]]]) -> None:
    """Discard a measurement from an invalid environment: it does not count as a look, and the next run repeats it."""
    for *_, last in benchmarks:
        if not last.facts["environment"]["valid"]:
            stages.discard(last)
