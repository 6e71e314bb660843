"""The body of the stage that writes the report with the verdict."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numprune.flows.names import CHECKPOINT
from numprune.flows.sections import Learn, Prune, Recover
from numprune.flows.stages import Artifact, read_facts
from numprune.flows.steps.results import (
    AttentionProbe,
    GeneratedText,
    Judgement,
    LearnedMasks,
    Parity,
    PrunedCheckpoint,
    QuantizedCheckpoint,
    RecoveredCheckpoint,
    TaskAnswers,
    TimedCheckpoint,
    Timings,
)
from numprune.serving.gates import Gate
from numprune.serving.report import AttentionMaps, Quality


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
