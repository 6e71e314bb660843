"""The whole chain as a Prefect flow: rows, pruning, exports, parity, quality, benchmark, gate, publication.

Each task is one stage. Prefect sees paths, digests and figures only; what has been done already is for the stages to
know, so no task caches. Deploy it as `flows/optimize.py:optimize`.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.artifacts import create_link_artifact, create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectAlreadyExists
from prefect.states import Completed, Failed, State

from numprune.flows import children, recipe, runs, server, stages, summary, tracing
from numprune.flows.bundle import CHECKPOINT, folder_name, make_release
from numprune.flows.names import RUNTIME_OF_EXPORT, export_of, runtime_of
from numprune.flows.run import Artifact, Run
from numprune.flows.runs import Recording
from numprune.flows.stages import StageResult

logger = logging.getLogger(__name__)

Step = Callable[..., StageResult]
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


@dataclass(frozen=True)
class Judged:
    """Every stage of a run up to the verdict.

    Attributes:
        report: the stage with report.json and the verdict.
        looks: the benchmarks by runtime.
        parts: what a release is made of, by the names of its folders.
        answers: the stage with the reference answers of a server of the release, or None where no server runs it.
    """

    report: StageResult
    looks: Mapping[Any, Sequence[StageResult]]
    parts: Mapping[str, Path]
    answers: StageResult | None


def _chain(run: Run, recording: Recording) -> dict[str, Any]:
    """Every stage of a run, and what `summary.summarize` gives of them."""
    done: list[StageResult] = []

    def call(step: Step, *arguments: Any) -> StageResult:
        result = step(*arguments)
        done.append(result)
        recording.add(result)
        return result

    judged = judge(run, call)
    outcome = str(judged.report.facts["outcome"])
    release = version = None
    if outcome == "pass":
        release, version = publish(run, judged.parts, judged.report, judged.answers)
    _discard_disturbed(judged.looks.values())
    recording.judged(outcome, judged.report.path, release, version)
    found = summary.summarize(recording.run, judged.report.path, done, release, version, _location(run))
    _show(judged.report.path, found)
    return found


def judge(run: Run, call: Callable[..., StageResult]) -> Judged:
    """Take every stage of a run, each by `call(task, *arguments)`."""
    calibration = call(sample_calibration, run)
    heldout = call(read_heldout, run)
    scores = call(score_baseline, run, heldout)
    pruned = call(prune, run, calibration)

    candidate = _artifact(pruned, CHECKPOINT)
    exports: dict[str, Artifact] = {}
    baselines: dict[str, Artifact] = {}
    parity: dict[str, Any] = {}
    for name in sorted(run.recipe.export.targets, key="vllm".__ne__):
        exports[name] = _artifact(call(export, run, name, candidate, "candidate"), folder_name(name))
        proof = call(prove, run, name, candidate, exports[name], "candidate")
        runtime = runtime_of(name, run.recipe.export.targets)
        parity[runtime or name] = proof.facts
        if name == "vllm":
            candidate = exports[name]  # what is released is what is exported further, evaluated and timed
        elif runtime in run.recipe.benchmark.runtimes:
            baselines[name] = _artifact(call(export, run, name, run.base, "baseline"), folder_name(name))
            call(prove, run, name, run.base, baselines[name], "baseline")

    # No server runs a masked language model.
    answers = call(make_reference_answers, run, candidate) if run.task != "masked-lm" else None
    quality = call(evaluate, run, candidate, heldout, scores)
    timed = {
        runtime: (exports.get(name, candidate), baselines.get(name, run.base))
        for runtime in run.recipe.benchmark.runtimes
        for name in [export_of(runtime, exports) or ""]
    }
    looks = {
        runtime: [call(benchmark, run, runtime, *sides, look) for look in _taken(run, runtime, *sides)]
        for runtime, sides in timed.items()
    }
    report = partial(call, gate, run, calibration, heldout, pruned, candidate, exports, parity, quality)
    judged = report(looks)
    if judged.reused and judged.facts["next_look"]:  # an earlier run ended inconclusive on the same figures
        for runtime in judged.facts["next_look"]:
            looks[runtime].append(call(benchmark, run, runtime, *timed[runtime], len(looks[runtime]) + 1))
        judged = report(looks)
    others = {name: made.path for name, made in exports.items() if name != "vllm"}
    return Judged(judged, looks, {CHECKPOINT: candidate.path} | others, answers)


# --- tasks ----------------------------------------------------------------------------------------


@task(cache_policy=NO_CACHE, persist_result=False)
def check(recipe_path: str | None, overrides: list[str], workspace: str | None) -> Run:
    """The recipe, found to be one that can be done here."""
    asked = recipe.load(Path(recipe_path) if recipe_path else recipe.EMBEDDED_RECIPE, overrides)
    run: Run = children.step("steps.checks.prepare", asked, stages.workspace_folder(workspace))
    return run


@task(cache_policy=NO_CACHE, persist_result=False)
def sample_calibration(run: Run) -> StageResult:
    data = run.recipe.data
    return run.stage(
        "calibration",
        "steps.text.make_calibration",
        inputs={"model": run.base.digest, "text": run.texts["calibration"]},
        sources={"model": run.base.path, "text": data.calibration},
        options={
            "samples": data.samples,
            "sequence_length": data.sequence_length,
            "seed": data.seed,
            "reading": data.reading(),
        },
        layer="numprune",
    )


@task(cache_policy=NO_CACHE, persist_result=False)
def read_heldout(run: Run) -> StageResult:
    data = run.recipe.data
    return run.stage(
        "heldout",
        "steps.text.make_heldout",
        inputs={"model": run.base.digest, "text": run.texts["heldout"]},
        sources={"model": run.base.path, "text": data.heldout},
        options={"sequence_length": data.sequence_length, "reading": data.reading()},
        layer="numprune",
    )


@task(cache_policy=NO_CACHE, persist_result=False)
def prune(run: Run, calibration: StageResult) -> StageResult:
    """Calibration, scores, allocation, compensation and surgery: one walk through the model."""
    with gpu_slot(run):
        return run.stage(
            "prune",
            "steps.prune.make_pruned",
            inputs={"base": run.base.digest, "rows": calibration.digest},
            sources={"base": run.base.path, "rows": calibration.path},
            options={
                "options": run.recipe.prune.options(),
                "target": run.recipe.target.sizes(),
                "device": run.device,
                "stream": run.recipe.prune.stream,
            },
            layer="export",
        )


@task(cache_policy=NO_CACHE, persist_result=False)
def export(run: Run, export_format: str, source: Artifact, side: str) -> StageResult:
    asked, load = run.recipe.export, run.recipe.benchmark
    by_format: dict[str, dict[str, Any]] = {
        "vllm": {"shard_size": asked.shard_size, "dtype": None if asked.dtype == "auto" else asked.dtype},
        "onnx": {"opset": asked.opset, "dtype": run.precision.get("onnxruntime")},
        "onnxruntime": {"dtype": run.precision.get("onnxruntime")},
        # An engine is built for sizes up to these, and for one kind of GPU.
        "tensorrt": {
            "max_batch": max(8, load.batch_size),
            "max_length": max(1024, load.prompt_length + load.output_length),
            "dtype": run.precision.get("tensorrt"),
        },
    }
    machine = {**run.machine} if export_format == "tensorrt" else {}
    return run.stage(
        f"export-{export_format}",
        "steps.export.make_export",
        inputs={"checkpoint": source.digest},
        sources={"source": source.path},
        options={"export_format": export_format, "options": by_format[export_format], "machine": machine},
        layer="export",
        label=f"export {export_format} {side}",
    )


@task(cache_policy=NO_CACHE, persist_result=False)
def prove(run: Run, export_format: str, reference: Artifact, exported: Artifact, side: str) -> StageResult:
    """Parity: it blocks."""
    with gpu_slot(run):
        return run.stage(
            f"parity-{export_format}",
            "steps.export.make_parity",
            inputs={"reference": reference.digest, "candidate": exported.digest},
            sources={"reference": reference.path, "candidate": exported.path},
            options={"runtime": RUNTIME_OF_EXPORT[export_format]},
            layer="export",
            label=f"parity {export_format} {side}",
        )


@task(cache_policy=NO_CACHE, persist_result=False)
def make_reference_answers(run: Run, candidate: Artifact) -> StageResult:
    """What a server of this checkpoint must answer."""
    with gpu_slot(run):
        return run.stage(
            "reference-answers",
            "steps.reference_answers.make_reference_answers",
            inputs={"checkpoint": candidate.digest},
            sources={"checkpoint": candidate.path},
            options={"device": run.device},
            layer="serving",
        )


@task(cache_policy=NO_CACHE, persist_result=False)
def score_baseline(run: Run, heldout: StageResult) -> StageResult:
    """The base on the held-out text and the prompts: the same for every ratio and method."""
    with gpu_slot(run):
        return run.stage(
            "baseline",
            "steps.baseline.make_baseline",
            inputs={"base": run.base.digest, "rows": heldout.digest},
            sources={"model": run.base.path, "rows": heldout.path},
            options=_evaluation(run, heldout),
            layer="export",
        )


@task(cache_policy=NO_CACHE, persist_result=False)
def evaluate(run: Run, candidate: Artifact, heldout: StageResult, scores: StageResult) -> StageResult:
    with gpu_slot(run):
        return run.stage(
            "quality",
            "steps.evaluate.make_quality",
            inputs={
                "base": run.base.digest,
                "candidate": candidate.digest,
                "rows": heldout.digest,
                "scores": scores.digest,
            },
            sources={
                "baseline": run.base.path,
                "candidate": candidate.path,
                "rows": heldout.path,
                "scores": scores.path,
            },
            options=_evaluation(run, heldout),
            layer="export",
        )


@task(cache_policy=NO_CACHE, persist_result=False)
def benchmark(run: Run, runtime: str, candidate: Artifact, baseline: Artifact, look: int) -> StageResult:
    with gpu_slot(run):
        return run.stage(
            **_benchmark_key(run, runtime, candidate, baseline, look),
            body="steps.benchmark.make_benchmark",
            sources={"candidate": candidate.path, "baseline": baseline.path},
            label=f"benchmark {runtime}" + (f" look {look}" if look > 1 else ""),
        )


@task(cache_policy=NO_CACHE, persist_result=False)
def gate(
    run: Run,
    calibration: StageResult,
    heldout: StageResult,
    pruned: StageResult,
    candidate: Artifact,
    exports: Mapping[str, Artifact],
    parity: Mapping[str, Any],
    quality: StageResult,
    benchmarks: Mapping[str, Sequence[StageResult]],
) -> StageResult:
    """report.json, report.md and report.html, with the verdict on all looks."""
    identity = {
        "base": run.base.digest,
        "candidate": candidate.digest,
        "recipe": run.recipe.digest,
        "calibration_rows": calibration.facts["digest"],
        "heldout_rows": heldout.facts["digest"],
        "plan": pruned.facts["plan"],
        "exports": {name: made.digest for name, made in exports.items()},
    }
    return run.stage(
        "report",
        "steps.report.make_report",
        inputs={
            "base": run.base.digest,
            "candidate": candidate.digest,
            "pruned": pruned.digest,
            "quality": quality.digest,
            **{
                f"benchmark-{runtime}-{number}": look.digest
                for runtime, looks in benchmarks.items()
                for number, look in enumerate(looks, start=1)
            },
        },
        sources={
            "base": run.base.path,
            "candidate": candidate.path,
            "pruned": pruned.path,
            "quality": quality.path,
            "benchmarks": {runtime: [look.path for look in looks] for runtime, looks in benchmarks.items()},
        },
        options={
            "name": run.recipe.registry.name,
            "identity": identity,
            "price_per_hour": run.recipe.benchmark.price_per_hour or None,
            "prune": run.recipe.prune.options(),
            "parity": {**parity},
            "policy": [gate.model_dump(exclude_none=True) for gate in run.recipe.gates],
        },
        layer="serving",
    )


@task(cache_policy=NO_CACHE, persist_result=False)
def publish(run: Run, parts: Mapping[str, Path], judged: StageResult, answers: StageResult | None) -> tuple[Path, str]:
    """The release folder, and the version of the registry that it became."""
    answers_folder = answers.path if answers else None
    release = make_release(run.workspace, run.recipe, parts, judged.path, answers_folder, run.record)
    registry = run.recipe.registry
    return release, str(children.step("steps.publish.publish", run.workspace, registry.uri, release, registry.name))


# --- details --------------------------------------------------------------------------------------


def _artifact(stage: StageResult, folder: str) -> Artifact:
    return Artifact(stage.path / folder, str(stage.facts["digest"]))


def _location(run: Run) -> list[str]:
    """The options with which a command finds this run's registry."""
    uri = run.recipe.registry.uri
    return ["--workspace", str(run.workspace), *([] if uri == "workspace" else ["--uri", uri])]


def _evaluation(run: Run, heldout: StageResult) -> dict[str, Any]:
    """What baseline and candidate are evaluated with."""
    return {
        "rows_digest": heldout.facts["digest"],
        "prompts": run.recipe.evaluate.prompts,
        "device": run.device,
    }


def _discard_disturbed(benchmarks: Iterable[Sequence[StageResult]]) -> None:
    """Forget what was measured in an invalid environment: it counts as no look, and the next run takes it again."""
    for *_, last in benchmarks:
        if not last.facts["environment"]["valid"]:
            stages.discard(last)


def _benchmark_key(run: Run, runtime: str, candidate: Artifact, baseline: Artifact, look: int) -> dict[str, Any]:
    """What makes one benchmark another stage than the next."""
    asked = run.recipe.benchmark
    return {
        "name": f"benchmark-{runtime}",
        "inputs": {"candidate": candidate.digest, "baseline": baseline.digest},
        "options": {
            "runtime": runtime,
            "device": asked.device,
            "dtype": run.precision[runtime],
            "torch_mode": asked.torch_mode if runtime == "torch" else "eager",
            "load": asked.load(runtime, run.task),
            "machine": {**run.machine},
            "look": look,
        },
        "layer": "serving",
    }


def _taken(run: Run, runtime: str, candidate: Artifact, baseline: Artifact) -> Iterator[int]:
    """The first look, and every further one that is in the workspace."""
    yield 1
    for look in count(2):
        if not stages.is_made(run.workspace, **_benchmark_key(run, runtime, candidate, baseline, look)):
            return
        yield look


@contextmanager
def gpu_slot(run: Run) -> Iterator[None]:
    """Hold the one slot of the GPU, when the run uses one. A killed run's slot comes back when its lease ends."""
    if not run.uses_gpu:
        yield
        return
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
