"""The stages of a recipe that export and evaluate: baseline, exports, parity, quality, tasks, benchmarks, report."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numprune.flows.names import ENGINE_BATCH, ENGINE_LENGTH, RUNTIME_OF_EXPORT
from numprune.flows.run import Run
from numprune.flows.stages import Artifact, Stage, StageResult
from numprune.flows.steps.bodies.evaluation import make_baseline, make_benchmark, make_quality, make_task_answers
from numprune.flows.steps.bodies.exports import (
    make_onnx,
    make_onnxruntime,
    make_parity,
    make_reference_answers,
    make_tensorrt,
    make_vllm,
)
from numprune.flows.steps.bodies.fid import make_image_metrics, make_real_features, make_sampled_features
from numprune.flows.steps.bodies.report import make_report
from numprune.flows.steps.results import (
    Answers,
    AttentionProbe,
    BaselineScores,
    Exported,
    GeneratedText,
    HeldoutRows,
    ImageFeatures,
    ImageMetrics,
    Judgement,
    LearnedMasks,
    Parity,
    PrunedCheckpoint,
    QuantizedCheckpoint,
    RecoveredCheckpoint,
    TaskAnswers,
    Timings,
)
from numprune.serving.report import AttentionMaps, Quality


def score_baseline(run: Run, corpus: str, heldout: StageResult[HeldoutRows]) -> Stage[BaselineScores]:
    stage = Stage.of(
        "baseline",
        "export",
        make_baseline,
        model=run.base,
        rows=heldout.artifact,
        rows_digest=heldout.facts.digest,
        prompts=_prompts(run, corpus),
        device=run.device,
    )
    return stage.labelled(f"baseline {corpus}".rstrip()).on_gpu()


def export(run: Run, export_format: str, source: Artifact, side: str) -> Stage[Exported]:
    name, asked, load = f"export-{export_format}", run.recipe.export, run.recipe.benchmark
    if export_format == "vllm":
        cast_to = None if asked.dtype == "auto" else asked.dtype
        stage = Stage.of(name, "export", make_vllm, source=source, shard_size=asked.shard_size, dtype=cast_to)
    elif export_format == "onnx":
        dtype = run.precision[RUNTIME_OF_EXPORT[export_format]]
        stage = Stage.of(name, "export", make_onnx, source=source, opset=asked.opset, dtype=dtype)
    elif export_format == "onnxruntime":
        dtype = run.precision[RUNTIME_OF_EXPORT[export_format]]
        stage = Stage.of(name, "export", make_onnxruntime, source=source, dtype=dtype)
    else:
        stage = Stage.of(
            name,
            "export",
            make_tensorrt,
            source=source,
            # An engine is built for sizes up to these and for one kind of GPU.
            max_batch=max(ENGINE_BATCH, load.batch_size),
            max_length=max(ENGINE_LENGTH, load.prompt_length + load.output_length),
            dtype=run.precision[RUNTIME_OF_EXPORT[export_format]],
            machine=run.machine,
        )
    return stage.labelled(f"export {export_format} {side}")


def prove(run: Run, export_format: str, reference: Artifact, exported: Artifact, side: str) -> Stage[Parity]:
    stage = Stage.of(
        f"parity-{export_format}",
        "export",
        make_parity,
        reference=reference,
        candidate=exported,
        runtime=RUNTIME_OF_EXPORT[export_format],
        # Verified on the device where it is timed. Engines run on GPUs only, even if the benchmark uses the CPU.
        device="auto" if export_format == "tensorrt" else run.recipe.benchmark.device,
    )
    return stage.labelled(f"parity {export_format} {side}").on_gpu()


def compute_answers(run: Run, candidate: Artifact, unquantized: Artifact | None) -> Stage[Answers]:
    return Stage.of(
        "reference-answers",
        "serving",
        make_reference_answers,
        checkpoint=candidate,
        unquantized=unquantized,
        device=run.device,
    ).on_gpu()


def evaluate(
    run: Run,
    corpus: str,
    candidate: Artifact,
    unquantized: Artifact | None,
    training: tuple[Artifact, Artifact] | None,
    heldout: StageResult[HeldoutRows],
    scores: StageResult[BaselineScores],
) -> Stage[Quality]:
    """`training`: the models before and after it."""
    pruned, trained = training or (None, None)
    stage = Stage.of(
        "quality",
        "serving",
        make_quality,
        candidate=candidate,
        unquantized=unquantized,
        pruned=pruned,
        trained=trained,
        baseline=run.base,
        scores=scores.artifact,
        rows=heldout.artifact,
        rows_digest=heldout.facts.digest,
        prompts=_prompts(run, corpus),
        samples=run.recipe.evaluate.samples if _is_first(run, corpus) else 0,
        guidance=run.recipe.evaluate.guidance,
        decoder=run.decoder,
        device=run.device,
    )
    return stage.labelled(f"quality {corpus}".rstrip()).on_gpu()


def read_real_images(run: Run) -> Stage[ImageFeatures]:
    assert run.fid_network is not None
    assert run.fid_images is not None
    return Stage.of(
        "real-features",
        "export",
        make_real_features,
        model=run.base,
        images=run.fid_images,
        decoder=run.decoder,
        network=run.fid_network,
        device=run.device,
    ).on_gpu()


def sample_images(run: Run, model: Artifact, side: str) -> Stage[ImageFeatures]:
    assert run.fid_network is not None
    stage = Stage.of(
        "sampled-features",
        "export",
        make_sampled_features,
        model=model,
        colours=run.base,
        samples=run.recipe.evaluate.fid_samples,
        guidance=run.recipe.evaluate.guidance,
        decoder=run.decoder,
        network=run.fid_network,
        device=run.device,
    )
    return stage.labelled(f"sampled features {side}").on_gpu()


def compare_images(run: Run, real: Artifact, baseline: Artifact, candidate: Artifact) -> Stage[ImageMetrics]:
    assert run.fid_network is not None
    return Stage.of(
        "fid",
        "export",
        make_image_metrics,
        real=real,
        baseline=baseline,
        candidate=candidate,
        network=Path(run.fid_network.source[0]).name,
    )


def answer_tasks(run: Run, model: Artifact, side: str) -> Stage[TaskAnswers]:
    assert run.tasks is not None
    asked = run.recipe.evaluate
    stage = Stage.of(
        "tasks",
        "serving",
        make_task_answers,
        model=model,
        tasks=run.tasks,
        num_fewshot=asked.num_fewshot,
        limit=asked.limit,
        runtime=asked.task_runtime,
        server=run.machine["vllm"] if asked.task_runtime == "vllm" else None,
        device=run.device,
    )
    return stage.labelled(f"tasks {side}").on_gpu()


def benchmark(run: Run, runtime: str, candidate: Artifact, baseline: Artifact, look: int) -> Stage[Timings]:
    asked = run.recipe.benchmark
    stage = Stage.of(
        f"benchmark-{runtime}",
        "serving",
        make_benchmark,
        candidate=candidate,
        baseline=baseline,
        runtime=runtime,
        device=asked.device,
        dtype=run.precision[runtime],
        torch_mode=asked.torch_mode if runtime == "torch" else "eager",
        load=asked.load(runtime, run.task, run.image_tokens),
        machine=run.machine,
        look=look,
    )
    return stage.labelled(f"benchmark {runtime}" + (f" look {look}" if look > 1 else "")).on_gpu().timed()


def report_on(
    run: Run,
    identity: Mapping[str, Any],
    candidate: Artifact,
    attention: StageResult[AttentionProbe] | None,
    maps: StageResult[AttentionMaps] | None,
    learned: StageResult[LearnedMasks] | None,
    pruned: StageResult[PrunedCheckpoint],
    generated: StageResult[GeneratedText] | None,
    recovered: StageResult[RecoveredCheckpoint] | None,
    quantized: StageResult[QuantizedCheckpoint] | None,
    parity: Mapping[str, Parity],
    quality: Mapping[str, StageResult[Quality]],
    images: StageResult[ImageMetrics] | None,
    answers: Mapping[str, Artifact],
    looks: Mapping[str, Sequence[StageResult[Timings]]],
) -> Stage[Judgement]:
    first, *others = quality
    return Stage.of(
        "report",
        "serving",
        make_report,
        base=run.base,
        candidate=candidate,
        attention=attention.artifact if attention else None,
        attention_maps=maps.artifact if maps else None,
        learned=learned.artifact if learned else None,
        pruned=pruned.artifact,
        generated=generated.artifact if generated else None,
        recovered=recovered.artifact if recovered else None,
        quantized=quantized.artifact if quantized else None,
        quality=quality[first].artifact,
        images=images.artifact if images else None,
        corpus=first,
        corpora={name: quality[name].artifact for name in others},
        answers=answers,
        benchmarks={runtime: [look.artifact for look in of_runtime] for runtime, of_runtime in looks.items()},
        name=run.recipe.registry.name,
        identity=identity,
        price_per_hour=run.recipe.benchmark.price_per_hour or None,
        asked=run.recipe.prune,
        asked_to_learn=run.recipe.learn,
        asked_to_recover=run.recipe.recover,
        parity=parity,
        policy=run.recipe.gates,
        candidates=run.candidates,
    )


def _prompts(run: Run, corpus: str) -> str | list[str]:
    """Of the first corpus's stages: both models generate once."""
    return run.recipe.evaluate.prompts if _is_first(run, corpus) else []


def _is_first(run: Run, corpus: str) -> bool:
    return corpus == next(iter(run.heldout))
