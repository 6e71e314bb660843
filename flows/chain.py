"""The stages of a recipe in their order, up to the verdict; candidate.py and evaluation.py have the stages."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Protocol, TypeVar

from numprune.flows.candidate import (
    draw_attention,
    generate,
    learn,
    probe_attention,
    prune,
    prune_within_time,
    quantize,
    read_heldout,
    recover,
    sample_calibration,
    sample_learning,
    sample_recovery,
    time_blocks,
)
from numprune.flows.evaluation import (
    answer_tasks,
    benchmark,
    compare_images,
    compute_answers,
    evaluate,
    export,
    prove,
    read_real_images,
    report_on,
    sample_images,
    score_baseline,
)
from numprune.flows.names import CHECKPOINT, export_of, folder_name, runtime_of
from numprune.flows.run import Run
from numprune.flows.stages import Artifact, Stage, StageResult, find
from numprune.flows.steps.results import Answers, Exported, Judgement, Parity, PrunedCheckpoint, Timings

R = TypeVar("R")


class Make(Protocol):
    """Provides a stage: computes it, or only checks whether it exists."""

    def __call__(self, stage: Stage[R], /) -> StageResult[R]: ...


@dataclass(frozen=True)
class Judged:
    """The stages of a run up to the verdict.

    Attributes:
        report: the stage with report.json and the verdict.
        looks: the benchmarks by runtime.
        parts: the parts of a release, by folder name.
        answers: the stage with the reference answers, or None if the release cannot be served.
    """

    report: StageResult[Judgement]
    looks: Mapping[str, Sequence[StageResult[Timings]]]
    parts: Mapping[str, Path]
    answers: StageResult[Answers] | None


def judge(run: Run, make: Make) -> Judged:
    """Run every stage up to the verdict through `make`."""
    calibration = make(sample_calibration(run))
    first, *further = run.heldout
    heldout = {name: make(read_heldout(run, name)) for name in run.heldout}
    # First of all, because it finds out whether the images fit.
    real = make(read_real_images(run)).artifact if run.fid_network else None
    masks = run.recipe.learn.method != "none"
    learning_rows = make(sample_learning(run, heldout.values())) if masks else None
    trains = run.recipe.recover.method != "none"
    generated = make(generate(run)) if trains and run.prompts else None
    rows = make(sample_recovery(run, heldout.values(), generated)) if trains else None
    scores = {name: make(score_baseline(run, name, read)) for name, read in heldout.items()}
    times = [make(time_blocks(run, width)) for width in run.timing_keys]
    learned = make(learn(run, learning_rows, times[0] if times else None)) if learning_rows else None
    attention = make(probe_attention(run, calibration)) if _prunes_heads(run) else None
    pruned: StageResult[PrunedCheckpoint]
    if times:
        timed_checkpoint = make(prune_within_time(run, calibration, times, learned))
        pruned = timed_checkpoint
    else:
        pruned = make(prune(run, calibration, learned))
    maps = make(draw_attention(run, pruned, heldout[first])) if attention and run.image_tokens else None

    candidate = Artifact(pruned.path / CHECKPOINT, pruned.facts.digest)
    recovered = make(recover(run, candidate, rows)) if rows else None
    if recovered:
        candidate = Artifact(recovered.path / CHECKPOINT, recovered.facts.digest)
    unquantized, quantized = candidate, None
    if run.recipe.quantize.scheme != "none":
        quantized = make(quantize(run, unquantized, calibration))
        candidate = Artifact(quantized.path / CHECKPOINT, quantized.facts.digest)

    exports: dict[str, Artifact] = {}
    baselines: dict[str, Artifact] = {}
    parity: dict[str, Parity] = {}
    for name in sorted(run.recipe.export.targets, key="vllm".__ne__):
        exports[name] = _artifact(make(export(run, name, candidate, "candidate")), name)
        proof = make(prove(run, name, candidate, exports[name], "candidate"))
        timed_in = runtime_of(name, run.recipe.export.targets)
        parity[timed_in or name] = proof.facts
        if name == "vllm":
            candidate = exports[name]  # the released checkpoint is the one exported, evaluated and timed
        elif timed_in in run.recipe.benchmark.runtimes:
            baselines[name] = _artifact(make(export(run, name, run.base, "baseline")), name)
            make(prove(run, name, run.base, baselines[name], "baseline"))

    before = unquantized if quantized else None
    answers = make(compute_answers(run, candidate, before)) if run.served else None
    training = None
    if recovered:  # both as pruning stored them: an export may cast
        cast = "vllm" in exports and run.recipe.export.dtype != "auto"
        untrained = Artifact(pruned.path / CHECKPOINT, pruned.facts.digest)
        training = untrained, unquantized if quantized or cast else candidate
    quality = {
        name: make(evaluate(run, name, candidate, before, training, heldout[name], scores[name]))
        for name in run.heldout
    }
    sides = {"baseline": run.base, "candidate": candidate}
    given = {side: make(answer_tasks(run, model, side)).artifact for side, model in sides.items() if run.tasks}
    drawn = {side: make(sample_images(run, model, side)).artifact for side, model in sides.items() if run.fid_network}
    compared = make(compare_images(run, real, **drawn)) if real else None
    timed: dict[str, Callable[[int], Stage[Timings]]] = {
        runtime: partial(benchmark, run, runtime, exports.get(name, candidate), baselines.get(name, run.base))
        for runtime in run.recipe.benchmark.runtimes
        for name in [export_of(runtime, exports) or ""]
    }
    looks: dict[str, list[StageResult[Timings]]] = {
        runtime: [make(look) for look in _taken(run, of_look)] for runtime, of_look in timed.items()
    }
    identity = {
        "base": run.base.digest,
        "candidate": candidate.digest,
        "recipe": run.recipe.digest,
        "calibration_rows": calibration.facts.digest,
        "heldout_rows": heldout[first].facts.digest,
        "corpora_rows": {name: heldout[name].facts.digest for name in further},
        **({"learning_rows": learning_rows.facts.digest} if learning_rows else {}),
        **({"learned": learned.facts.model} if learned and learned.facts.model else {}),
        "plan": pruned.facts.plan,
        **({"recovery_rows": rows.facts.digest} if rows else {}),
        **({"generated_rows": generated.facts.digest} if generated else {}),
        **({"pruned": pruned.facts.digest} if recovered or quantized else {}),
        **({"recovered": recovered.facts.digest} if recovered else {}),
        **({"tasks": run.tasks.digest} if run.tasks else {}),
        **({"decoder": run.decoder.digest} if run.decoder else {}),
        **({"fid_network": run.fid_network.digest} if run.fid_network else {}),
        **({"fid_images": run.fid_images.digest} if run.fid_images else {}),
        "exports": {name: made.digest for name, made in exports.items()},
    }
    report = partial(
        report_on,
        run,
        identity,
        candidate,
        attention,
        maps,
        learned,
        pruned,
        generated,
        recovered,
        quantized,
        parity,
        quality,
        compared,
        given,
    )
    judged = make(report(looks))
    if judged.reused and judged.facts.next_look:  # an earlier run with the same figures was inconclusive
        for runtime in judged.facts.next_look:
            looks[runtime].append(make(timed[runtime](len(looks[runtime]) + 1)))
        judged = make(report(looks))
    others = {name: made.path for name, made in exports.items() if name != "vllm"}
    return Judged(judged, looks, {CHECKPOINT: candidate.path} | others, answers)


def _prunes_heads(run: Run) -> bool:
    return not {"kv-groups", "query-heads"}.isdisjoint(run.recipe.prune.axes)


def _artifact(made: StageResult[Exported], export_format: str) -> Artifact:
    return Artifact(made.path / folder_name(export_format), made.facts.digest)


def _taken(run: Run, of_look: Callable[[int], Stage[Timings]]) -> Iterator[Stage[Timings]]:
    """The first look, and every further one in the workspace."""
    yield of_look(1)
    for number in count(2):
        look = of_look(number)
        if find(run.workspace, look) is None:
            return
        yield look
