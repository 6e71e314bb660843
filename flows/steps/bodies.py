"""The bodies of a run's stages, each a function of artifacts and plain values to a folder and a result.

A run's main process only refers to these functions; a child process runs them and imports the tensor libraries.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from numprune.documents import Reading
from numprune.errors import InputError
from numprune.flows.names import LEARNED, LEARNED_PLAN, ROOFLINE, TaskRuntime, TorchMode
from numprune.flows.sections import BlockTimings, FewShot, Learn, Limit, Prune, Quantize, Recover
from numprune.flows.stages import Artifact, Text, read_facts
from numprune.flows.steps.results import (
    Answers,
    AttentionProbe,
    BaselineScores,
    CalibrationRows,
    Exported,
    GeneratedText,
    HeldoutRows,
    Judgement,
    LearnedMasks,
    LearningText,
    Parity,
    PrunedCheckpoint,
    QuantizedCheckpoint,
    RecoveredCheckpoint,
    RecoveryText,
    TaskAnswers,
    TimedCheckpoint,
    Timings,
)
from numprune.serving.gates import Gate
from numprune.serving.report import AttentionMaps, Quality
from numprune.target import Target
from numprune.timings import TimingTable


def make_calibration(
    out: Path, *, model: Artifact, text: Text, samples: int, sequence_length: int, seed: int, reading: Reading
) -> CalibrationRows:
    """Draw the calibration rows."""
    from numprune.export.checkpoint import text_tokenizer
    from numprune.export.tasks import load_task
    from numprune.flows.steps.text import calibration_rows, save_calibration

    rows, draw = calibration_rows(
        text.source,
        text_tokenizer(model.path),
        samples,
        sequence_length,
        seed,
        reading,
        option="data.samples",
        task=load_task(model.path),
    )
    return save_calibration(out, rows, draw)


def make_heldout(out: Path, *, model: Artifact, text: Text, sequence_length: int, reading: Reading) -> HeldoutRows:
    """Prepare the held-out rows."""
    from numprune.export.checkpoint import text_tokenizer
    from numprune.export.tasks import load_task
    from numprune.flows.steps.text import save_heldout, text_rows, warn_of_windows

    task = load_task(model.path)
    tokenizer = text_tokenizer(model.path)
    rows = text_rows(text.source, "heldout", tokenizer, sequence_length, reading, task=task)
    if tokenizer is not None:
        warn_of_windows(rows, "data.split")
    return save_heldout(out, rows, task)


def make_baseline(
    out: Path, *, model: Artifact, rows: Artifact, rows_digest: str, prompts: str | list[str], device: str
) -> BaselineScores:
    """Score the base on the held-out rows and the prompts: shared by all ratios and methods."""
    from numprune.export.checkpoint import load_model, text_tokenizer
    from numprune.export.tasks import load_task
    from numprune.flows.steps.baseline import prompts_of, score
    from numprune.flows.steps.text import load_heldout

    loaded, tokenizer = load_model(model.path).to(device), text_tokenizer(model.path)
    held_out = load_heldout(rows.path, rows_digest)
    return score(out, loaded, tokenizer, held_out, prompts_of(prompts), load_task(model.path))


def make_learning_rows(
    out: Path,
    *,
    model: Artifact,
    text: Text,
    heldout: Mapping[str, Artifact],
    asked: Learn,
    sequence_length: int,
    reading: Reading,
) -> LearningText:
    """Draw the rows that masks are trained on and chosen by, none of those that the model is judged on.

    `heldout`: stages of `make_heldout` by the digests of their rows.
    """
    from numprune.flows.steps.learn import training_rows
    from numprune.flows.steps.text import load_heldout
    from numprune.flows.steps.training import save_rows

    judged, tokens = [load_heldout(one.path, digest) for digest, one in heldout.items()], asked.trained_tokens
    rows, draw = training_rows(
        text.source, model.path, sequence_length, tokens, asked.seed, reading, "data.calibration", judged
    )
    return LearningText(**asdict(save_rows(out, rows)), draw=draw)


def make_learned(
    out: Path,
    *,
    base: Artifact,
    rows: Artifact,
    times: Artifact | None,
    asked: Learn,
    limits: Mapping[str, Any],
    target: Target,
    device: str,
) -> LearnedMasks:
    """Train masks, into the folder `learned`. A killed training resumes from its last state.

    Args:
        times: the stage of `make_timings`, for a budget of time.
        limits: the fields `names.LEARNED_LIMITS` of the recipe's section on pruning.
    """
    import torch

    from numprune.flows.stages import kept_beside
    from numprune.flows.steps.learn import learn_checkpoint, options_of, request_of
    from numprune.flows.steps.training import load_rows

    table = read_facts(times.path, TimingTable) if times else None
    options, where = options_of(asked, limits, target, base.path, table), torch.device(device)
    request, draw = request_of(asked, options), read_facts(rows.path, LearningText).draw
    return learn_checkpoint(
        base.path, load_rows(rows.path), draw, options, request, out / LEARNED, where, kept_beside(out)
    )


def make_attention(out: Path, *, base: Artifact, rows: Artifact, stream: bool, device: str) -> AttentionProbe:
    """Measure what the base's attention heads attend to: shared by all ratios and methods."""
    import torch

    from numprune.flows.steps.attention import probe
    from numprune.flows.steps.text import load_calibration

    tokens, _ = load_calibration(rows.path)
    return probe(base.path, tokens, torch.device(device), stream=stream, scratch=out)


def make_attention_maps(
    out: Path, *, base: Artifact, pruned: Artifact, rows: Artifact, rows_digest: str, stream: bool, device: str
) -> AttentionMaps:
    """Draw where the heads of base and pruned model look in held-out images; `pruned`: the stage."""
    import torch

    from numprune.flows.bundle import CHECKPOINT
    from numprune.flows.steps.attention_maps import draw_maps
    from numprune.flows.steps.text import load_heldout

    images, where = load_heldout(rows.path, rows_digest), torch.device(device)
    return draw_maps(base.path, pruned.path / CHECKPOINT, images, where, stream=stream, scratch=out)


def make_pruned(
    out: Path,
    *,
    base: Artifact,
    origin: Artifact,
    rows: Artifact,
    learned: Artifact | None,
    asked: Prune,
    target: Target,
    scheme: str,
    device: str,
) -> PrunedCheckpoint:
    """Prune into the folder `checkpoint`: scores, allocation, compensation and surgery in one pass.

    Args:
        base: the recipe's model, `origin`, or what training made of it together with masks.
        learned: with the plan to follow; None: criterion and allocation choose.
        scheme: that a budget counts with.
    """
    import torch

    from numprune.flows.bundle import CHECKPOINT
    from numprune.flows.steps.prune import options_of, planned, prune_checkpoint
    from numprune.flows.steps.text import load_calibration

    tokens, draw = load_calibration(rows.path)
    if learned:
        plan, options = planned(learned.path / LEARNED_PLAN, asked)
    else:
        plan, options = None, options_of(asked, target, base.path, scheme)
    return prune_checkpoint(
        base.path,
        tokens,
        options,
        out / CHECKPOINT,
        torch.device(device),
        draw=draw,
        stream=asked.stream,
        plan=plan,
        origin=origin.path,
    )


def make_timings(
    out: Path,
    *,
    model: Text,
    scenario: str,
    asked: BlockTimings,
    target: Target,
    machine: dict[str, str],
) -> TimingTable:
    """Measure or estimate the latencies of the model's blocks. A killed measurement goes on where it stopped.

    `machine` is part of the key.
    """
    from numprune.flows.stages import kept_beside
    from numprune.flows.steps.estimates import estimate
    from numprune.flows.steps.timings import measure, timing_request
    from numprune.scenario import parse_scenario

    assert isinstance(model.source, str)
    base = Path(model.source)
    if asked.runtime == ROOFLINE:
        return estimate(base, [parse_scenario(scenario)], target, asked.sizes, asked.peaks())
    return measure(base, timing_request(asked, scenario, target), kept_beside(out))


def make_pruned_within_time(
    out: Path,
    *,
    base: Artifact,
    origin: Artifact,
    rows: Artifact,
    times: Artifact,
    learned: Artifact | None,
    asked: Prune,
    target: Target,
    device: str,
    machine: dict[str, str],
) -> TimedCheckpoint:
    """Prune into the folder `checkpoint`, which is measured, too.

    Args:
        base, origin, learned: as for `make_pruned`.
        times: the stage of `make_timings`.
        machine: part of the key.
    """
    import torch

    from numprune.flows.bundle import CHECKPOINT
    from numprune.flows.steps.prune import planned
    from numprune.flows.steps.text import load_calibration
    from numprune.flows.steps.timed_prune import options_within_time, prune_within_time

    tokens, draw = load_calibration(rows.path)
    if learned:
        plan, options = planned(learned.path / LEARNED_PLAN, asked)
    else:
        plan, options = None, options_within_time(asked, target, base.path, read_facts(times.path, TimingTable))
    return prune_within_time(
        base.path,
        tokens,
        options,
        out / CHECKPOINT,
        torch.device(device),
        draw=draw,
        stream=asked.stream,
        plan=plan,
        origin=origin.path,
    )


def make_generated(
    out: Path,
    *,
    model: Artifact,
    prompts: Text,
    tokens: int,
    batch_size: int,
    selection_rows: int,
    share: float,
    seed: int,
    sequence_length: int,
    device: str,
) -> GeneratedText:
    """Have the dense model generate `share` of the training rows. A killed run resumes after its last answers."""
    import torch

    from numprune.flows.stages import kept_beside
    from numprune.flows.steps.generate import generated_text, generated_windows, save_generated
    from numprune.recovery import RecoveryOptions

    options = RecoveryOptions(tokens=tokens, batch_size=batch_size, selection_rows=selection_rows)
    windows, where = generated_windows(options, sequence_length, share), torch.device(device)
    asked = (model.path, list(prompts.source), windows, sequence_length, seed, where, kept_beside(out))
    with generated_text(*asked) as made:
        return save_generated(out, made)


def make_recovery_rows(
    out: Path,
    *,
    model: Artifact,
    text: Text,
    heldout: Mapping[str, Artifact],
    generated: Artifact | None,
    asked: Recover,
    sequence_length: int,
    reading: Reading,
) -> RecoveryText:
    """Draw the rows of training and selection, none of those that the model is judged on.

    `heldout`: stages of `make_heldout` by the digests of their rows; `generated`: that of `make_generated`, with the
    digest of its rows.
    """
    from numprune.export.checkpoint import load_tokenizer
    from numprune.export.tasks import load_task
    from numprune.flows.steps.generate import load_generated
    from numprune.flows.steps.recover import options_of, training_rows
    from numprune.flows.steps.text import load_heldout
    from numprune.flows.steps.training import save_rows

    judged, options = [load_heldout(one.path, digest) for digest, one in heldout.items()], options_of(asked)
    option, more = "recover.selection_rows", None
    if generated:
        more = load_generated(generated.path, generated.digest)
    tokenizer = load_tokenizer(model.path)
    source = text.source if asked.generated_share < 1 or more is None else None
    task = load_task(model.path)
    rows = training_rows(source, tokenizer, sequence_length, options, reading, option, judged, more, task)
    return save_rows(out, rows)


def make_recovered(
    out: Path, *, source: Artifact, dense: Artifact, rows: Artifact, asked: Recover, device: str
) -> RecoveredCheckpoint:
    """Train towards the dense model, into the folder `checkpoint`. A killed training resumes from its last state."""
    import torch

    from numprune.flows.bundle import CHECKPOINT
    from numprune.flows.stages import kept_beside
    from numprune.flows.steps.recover import options_of, recover_checkpoint
    from numprune.flows.steps.training import load_rows

    options, where = options_of(asked), torch.device(device)
    return recover_checkpoint(
        source.path, dense.path, load_rows(rows.path), options, out / CHECKPOINT, where, kept_beside(out)
    )


def make_quantized(
    out: Path, *, source: Artifact, dense: Artifact, rows: Artifact, asked: Quantize, device: str
) -> QuantizedCheckpoint:
    """Quantize into the folder `checkpoint`; GPTQ fits to the outputs of the dense model, if its stream is the same."""
    import torch

    from numprune.flows.bundle import CHECKPOINT
    from numprune.flows.steps.quantize import quantize_checkpoint, schemes_of, target_of
    from numprune.flows.steps.text import load_calibration

    schemes, where = schemes_of(asked.scheme, asked.channels_per_scale, source.path), torch.device(device)
    if asked.method == "rtn":
        found = quantize_checkpoint(source.path, schemes, out / CHECKPOINT, where, lm_head_bits=asked.lm_head_bits)
    else:
        tokens, draw = load_calibration(rows.path)
        found = quantize_checkpoint(
            source.path,
            schemes,
            out / CHECKPOINT,
            where,
            rows=tokens,
            draw=draw,
            dense=target_of(source.path, dense.path),
            lm_head_bits=asked.lm_head_bits,
        )
    return QuantizedCheckpoint(method=asked.method, **found)


def make_vllm(out: Path, *, source: Artifact, shard_size: str, dtype: str | None) -> Exported:
    """Export for vLLM, into the release's folder name, like the other exports. `dtype` None: as stored."""
    return _exported(out, source, "vllm", shard_size=shard_size, dtype=dtype)


def make_onnx(out: Path, *, source: Artifact, opset: int, dtype: str) -> Exported:
    return _exported(out, source, "onnx", opset=opset, dtype=dtype)


def make_onnxruntime(out: Path, *, source: Artifact, dtype: str) -> Exported:
    return _exported(out, source, "onnxruntime", dtype=dtype)


def make_tensorrt(
    out: Path, *, source: Artifact, max_batch: int, max_length: int, dtype: str, machine: dict[str, str]
) -> Exported:
    """Build an engine; `machine` is part of the key because an engine fits one kind of GPU."""
    return _exported(out, source, "tensorrt", max_batch=max_batch, max_length=max_length, dtype=dtype)


def _exported(out: Path, source: Artifact, export_format: str, **options: Any) -> Exported:
    from numprune.flows.bundle import folder_name
    from numprune.flows.steps.export import export

    made = export(source.path, out / folder_name(export_format), export_format, **options)
    return Exported(made.digest, sum(entry.size for entry in made.files.values()))


def make_parity(out: Path, *, reference: Artifact, candidate: Artifact, runtime: str, device: str) -> Parity:
    """Verify that `candidate` in `runtime` on `device` computes what `reference` does. Raises ParityError."""
    from numprune.flows.steps.export import prove

    return prove(reference.path, candidate.path, runtime, device)


def make_reference_answers(out: Path, *, checkpoint: Artifact, unquantized: Artifact | None, device: str) -> Answers:
    """Write reference-answers.json: the answers expected from a server of the checkpoint.

    A quantized checkpoint is held to the noise floor of the `unquantized` one.
    """
    import torch

    from numprune.flows.steps.reference_answers import answers_of
    from numprune.serving.reference_answers import PooledAnswers

    before = unquantized.path if unquantized else None
    made = answers_of(checkpoint.path, torch.device(device), unquantized=before)
    made.write(out)
    texts = made.inputs if isinstance(made, PooledAnswers) else made.prompts
    return Answers(len(texts), made.length)


def make_quality(
    out: Path,
    *,
    candidate: Artifact,
    unquantized: Artifact | None,
    pruned: Artifact | None,
    trained: Artifact | None,
    baseline: Artifact,
    scores: Artifact,
    rows: Artifact,
    rows_digest: str,
    prompts: str | list[str],
    device: str,
    samples: int = 0,
    guidance: float = 1.0,
    decoder: Text | None = None,
) -> Quality:
    """Compare the candidate with the baseline; `scores` is the stage that scored the baseline on the same rows and
    prompts.

    A quantized candidate is also compared with the `unquantized` one, and the `trained` model with the `pruned` one.
    From image generators, `samples` images are drawn with classifier-free guidance of the scale `guidance`; `decoder`
    turns their codes into pictures.
    """
    import torch

    from numprune.export.tasks import load_task
    from numprune.flows.steps.baseline import prompts_of
    from numprune.flows.steps.evaluate import compare_with_scores
    from numprune.flows.steps.generators import same_file
    from numprune.flows.steps.images import compare_images
    from numprune.flows.steps.text import load_heldout
    from numprune.tasks.codes import ImageCodes

    held_out, where = load_heldout(rows.path, rows_digest), torch.device(device)
    found = compare_with_scores(
        candidate.path,
        baseline.path,
        scores.path,
        read_facts(scores.path, BaselineScores).generations,
        held_out,
        prompts_of(prompts),
        where,
        unquantized=unquantized.path if unquantized else None,
        pruned=pruned.path if pruned else None,
        trained=trained.path if trained else None,
    )
    if samples and isinstance(load_task(baseline.path), ImageCodes):
        drawn_by = same_file(decoder, "evaluate.decoder") if decoder else None
        found["images"] = compare_images(candidate.path, baseline.path, held_out, samples, guidance, drawn_by, where)
    return Quality.model_validate(found)


def make_task_answers(
    out: Path,
    *,
    model: Artifact,
    tasks: Text,
    num_fewshot: FewShot,
    limit: Limit,
    runtime: TaskRuntime,
    server: str | None,
    device: str,
) -> TaskAnswers:
    """Have a model answer the tasks; the base's answers are shared by all ratios and methods.

    Killed, it goes on after the last task that was answered. `server` is part of the key: what vLLM's environment has.
    """
    import torch

    from numprune.flows.stages import code_version, kept_beside
    from numprune.flows.steps.answers import answer
    from numprune.flows.steps.harness import load_tasks
    from numprune.flows.steps.training import kept_until_done

    loaded = load_tasks(list(tasks.source), num_fewshot, limit)
    if loaded.digest() != tasks.digest:
        raise InputError("evaluate.tasks: their items changed after the run began; run the command again")
    asked = [model.digest, tasks.digest, runtime, server, device, code_version("serving")]
    with kept_until_done(kept_beside(out), asked, "tasks") as (folder, _):
        return answer(out, loaded, model.path, runtime, torch.device(device), folder)


def make_benchmark(
    out: Path,
    *,
    candidate: Artifact,
    baseline: Artifact,
    runtime: str,
    device: str,
    dtype: str,
    torch_mode: TorchMode,
    load: dict[str, Any],
    machine: dict[str, str],
    look: int,
) -> Timings:
    """Benchmark both, in `dtype`.

    `machine` and `look` are part of the key: another machine, or another look at the same load, is another stage.
    """
    from numprune.flows.steps.benchmark import time_both

    return time_both(candidate.path, baseline.path, runtime, device, dtype, torch_mode, load)


def make_report(
    out: Path,
    *,
    base: Artifact,
    candidate: Artifact,
    attention: Artifact | None,
    attention_maps: Artifact | None,
    learned: Artifact | None,
    pruned: Artifact,
    generated: Artifact | None,
    recovered: Artifact | None,
    quantized: Artifact | None,
    quality: Artifact,
    images: Artifact | None,
    corpus: str,
    corpora: Mapping[str, Artifact],
    answers: Mapping[str, Artifact],
    benchmarks: Mapping[str, Sequence[Artifact]],
    name: str,
    identity: Mapping[str, Any],
    price_per_hour: float | None,
    asked: Prune,
    asked_to_learn: Learn,
    asked_to_recover: Recover,
    parity: Mapping[str, Parity],
    policy: Sequence[Gate],
    candidates: int,
) -> Judgement:
    """Write report.json, report.md, report.html and junit.xml, with the verdict.

    Args:
        base, candidate: the pruned base, and the released checkpoint.
        attention, attention_maps, learned, pruned, generated, recovered, quantized, quality, benchmarks: stages;
            benchmarks by runtime, with every look.
        images: the stage that compared samples with real images.
        answers: the stages with the answers to tasks of "baseline" and "candidate"; empty without tasks.
        corpus: the name of the text that `quality` is of, where it has one; `corpora`: quality on the others, by name.
        asked, asked_to_learn, asked_to_recover: how the candidate was to be pruned, and trained.
        policy: the gates; `candidates`: how many this one is chosen among.
    """
    from numprune.flows.bundle import CHECKPOINT
    from numprune.flows.steps.answers import compare_answers
    from numprune.flows.steps.attention import attention_section
    from numprune.flows.steps.fid import with_images
    from numprune.flows.steps.report import (
        assemble,
        judged,
        learning_section,
        pooled,
        pruning_section,
        quantization_section,
        recovery_section,
        sizes,
    )
    from numprune.plans import PLAN_FILE, read_plan

    named: dict[str, Any] = {"corpus": corpus} if corpus else {}
    if corpora:
        named["corpora"] = {name: read_facts(made.path, Quality) for name, made in corpora.items()}
    made: PrunedCheckpoint = read_facts(pruned.path, TimedCheckpoint if asked.allowed.time else PrunedCheckpoint)
    heads = None
    if attention:
        maps = read_facts(attention_maps.path, AttentionMaps) if attention_maps else None
        plan = read_plan(pruned.path / CHECKPOINT / PLAN_FILE)
        heads = attention_section(read_facts(attention.path, AttentionProbe), plan, maps)
    sections = {
        "pruning": {**pruning_section(asked, asked_to_learn if learned else None, made), "attention": heads},
        "learning": learning_section(asked_to_learn, read_facts(learned.path, LearnedMasks)) if learned else None,
        "recovery": recovery_section(
            asked_to_recover,
            read_facts(recovered.path, RecoveredCheckpoint),
            read_facts(generated.path, GeneratedText) if generated else None,
        )
        if recovered
        else None,
        "quantization": quantization_section(read_facts(quantized.path, QuantizedCheckpoint)) if quantized else None,
        "sizes": sizes(base.path, candidate.path),
        "quality": with_images(read_facts(quality.path, Quality).model_copy(update=named), images),
        "parity": parity,
    }
    if answers:
        sides = {side: stage.path for side, stage in answers.items()}
        sections["tasks"] = compare_answers(**sides, found=read_facts(sides["candidate"], TaskAnswers))
    timings = {
        runtime: pooled(runtime, [read_facts(look.path, Timings) for look in looks])
        for runtime, looks in benchmarks.items()
    }
    report = assemble(name, {"name": name, **identity}, sections, timings, price_per_hour, candidates)
    return judged(report, policy, out)
