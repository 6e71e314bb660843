"""The stages of a recipe that lead to the candidate: rows, masks, pruning, training, quantization."""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from numprune.export.files import CONFIG
from numprune.export.manifest import sha256_file
from numprune.flows.names import LEARNED, LEARNED_LIMITS, LEARNED_MODEL
from numprune.flows.run import Run
from numprune.flows.sections import Learn, Recover
from numprune.flows.stages import Artifact, Stage, StageResult, Text
from numprune.flows.steps.bodies.candidate import (
    make_attention,
    make_attention_maps,
    make_learned,
    make_pruned,
    make_pruned_within_time,
    make_quantized,
    make_recovered,
    make_timings,
)
from numprune.flows.steps.bodies.rows import (
    make_calibration,
    make_generated,
    make_heldout,
    make_learning_rows,
    make_recovery_rows,
)
from numprune.flows.steps.results import (
    AttentionProbe,
    CalibrationRows,
    GeneratedText,
    HeldoutRows,
    LearnedMasks,
    LearningText,
    PrunedCheckpoint,
    QuantizedCheckpoint,
    RecoveredCheckpoint,
    RecoveryText,
    TimedCheckpoint,
)
from numprune.hidden import Width
from numprune.scenario import parse_time
from numprune.served import AS_STORED
from numprune.serving.report import AttentionMaps
from numprune.timings import TimingTable

R = TypeVar("R")


def sample_calibration(run: Run) -> Stage[CalibrationRows]:
    data = run.recipe.data
    return Stage.of(
        "calibration",
        "export",
        make_calibration,
        model=run.base,
        text=run.calibration,
        samples=data.samples,
        sequence_length=data.sequence_length,
        seed=data.seed,
        reading=data.reading(),
    )


def read_heldout(run: Run, corpus: str) -> Stage[HeldoutRows]:
    data = run.recipe.data
    stage = Stage.of(
        "heldout",
        "export",
        make_heldout,
        model=run.base,
        text=run.heldout[corpus],
        sequence_length=data.sequence_length,
        reading=data.reading(),
    )
    return stage.labelled(f"heldout {corpus}".rstrip())


def sample_learning(run: Run, heldout: Iterable[StageResult[HeldoutRows]]) -> Stage[LearningText]:
    return _training_rows(run, heldout, "learning-rows", make_learning_rows, _masks(run))


def _masks(run: Run) -> Learn:
    """The options of masks with the number of tokens, because a variant's default is not in the code of a stage."""
    return run.recipe.learn.model_copy(update={"tokens": run.recipe.learn.trained_tokens})


def learn(run: Run, rows: StageResult[LearningText], times: StageResult[TimingTable] | None) -> Stage[LearnedMasks]:
    return Stage.of(
        "learn",
        "export",
        make_learned,
        base=run.base,
        rows=rows.artifact,
        times=times.artifact if times else None,
        asked=_masks(run),
        limits=run.recipe.prune.model_dump(include={*LEARNED_LIMITS}),
        target=run.recipe.sizes(),
        served=run.recipe.served() if times else AS_STORED,
        device=run.device,
    ).on_gpu()


def probe_attention(run: Run, calibration: StageResult[CalibrationRows]) -> Stage[AttentionProbe]:
    return Stage.of(
        "attention",
        "export",
        make_attention,
        base=run.base,
        rows=calibration.artifact,
        stream=run.recipe.prune.stream,
        device=run.device,
    ).on_gpu()


def draw_attention(
    run: Run, pruned: StageResult[PrunedCheckpoint], heldout: StageResult[HeldoutRows]
) -> Stage[AttentionMaps]:
    return Stage.of(
        "attention-maps",
        "serving",
        make_attention_maps,
        base=run.base,
        pruned=pruned.artifact,
        rows=heldout.artifact,
        rows_digest=heldout.facts.digest,
        stream=run.recipe.prune.stream,
        device=run.device,
    ).on_gpu()


def time_blocks(run: Run, width: Width | None) -> Stage[TimingTable]:
    """Return the stage that times the blocks at a hidden size, a key of `run.timing_keys`."""
    assert run.recipe.prune.allowed.time is not None
    stage = Stage.of(
        "timings",
        "serving",
        make_timings,
        # Blocks of equal sizes take the same time whatever their weights are.
        model=Text(str(run.base.path), sha256_file(run.base.path / CONFIG)),
        scenario=str(parse_time(run.recipe.prune.allowed.time).scenario),
        asked=run.recipe.timings,
        target=run.recipe.sizes(),
        served=run.recipe.served(),
        width=width,
        machine={**run.machine, "timings": run.timing_keys[width]},  # pruning refuses a table with another key
    )
    return stage.labelled(f"timings at hidden size {width.hidden_size}" if width else stage.name).on_gpu().timed()


def prune_within_time(
    run: Run,
    calibration: StageResult[CalibrationRows],
    times: Sequence[StageResult[TimingTable]],
    learned: StageResult[LearnedMasks] | None,
) -> Stage[TimedCheckpoint]:
    base, plan = _planned(run, learned)
    stage = Stage.of(
        "prune",
        "serving",
        make_pruned_within_time,
        base=base,
        origin=run.base,
        rows=calibration.artifact,
        times=[table.artifact for table in times],
        learned=plan,
        asked=run.recipe.prune,
        target=run.recipe.sizes(),
        served=run.recipe.served(),
        device=run.device,
        machine=run.machine,
    )
    return stage.on_gpu().timed()


def prune(
    run: Run, calibration: StageResult[CalibrationRows], learned: StageResult[LearnedMasks] | None
) -> Stage[PrunedCheckpoint]:
    base, plan = _planned(run, learned)
    return Stage.of(
        "prune",
        "export",
        make_pruned,
        base=base,
        origin=run.base,
        rows=calibration.artifact,
        learned=plan,
        asked=run.recipe.prune,
        target=run.recipe.sizes(),
        scheme=run.recipe.quantize.scheme if run.recipe.prune.allowed.bytes else "none",  # only a budget counts it
        device=run.device,
    ).on_gpu()


def _planned(run: Run, learned: StageResult[LearnedMasks] | None) -> tuple[Artifact, Artifact | None]:
    """Return the model to prune and, with masks, the folder with their plan."""
    if learned is None:
        return run.base, None
    plan = Artifact(learned.path / LEARNED, learned.facts.digest)
    if not learned.facts.model:
        return run.base, plan
    return Artifact(plan.path / LEARNED_MODEL, learned.facts.model), plan  # the plan is for the weights trained with it


def generate(run: Run) -> Stage[GeneratedText]:
    assert run.prompts is not None  # asked for by whoever has some
    asked = run.recipe.recover
    return Stage.of(
        "generated",
        "export",
        make_generated,
        model=run.base,
        prompts=run.prompts,
        # What else is asked of the training does not change the text.
        tokens=asked.tokens,
        batch_size=asked.batch_size,
        selection_rows=asked.selection_rows,
        share=asked.generated_share,
        seed=asked.seed,
        sequence_length=run.recipe.data.sequence_length,
        device=run.device,
    ).on_gpu()


def sample_recovery(
    run: Run, heldout: Iterable[StageResult[HeldoutRows]], generated: StageResult[GeneratedText] | None
) -> Stage[RecoveryText]:
    more = Artifact(generated.path, generated.facts.digest) if generated else None
    return _training_rows(run, heldout, "recovery-rows", make_recovery_rows, _training(run), generated=more)


def _training(run: Run) -> Recover:
    """The options of training without the paths of prompts: what was generated from them is an input of its own."""
    return run.recipe.recover.model_copy(update={"prompts": []})


def _training_rows(
    run: Run,
    heldout: Iterable[StageResult[HeldoutRows]],
    name: str,
    body: Callable[..., R],
    asked: Learn | Recover,
    **more: Artifact | None,
) -> Stage[R]:
    data = run.recipe.data
    return Stage.of(
        name,
        "export",
        body,
        model=run.base,
        text=run.calibration,
        heldout={read.facts.digest: read.artifact for read in heldout},
        asked=asked,
        sequence_length=data.sequence_length,
        reading=data.reading(),
        **more,
    )


def recover(run: Run, source: Artifact, rows: StageResult[RecoveryText]) -> Stage[RecoveredCheckpoint]:
    return Stage.of(
        "recover",
        "export",
        make_recovered,
        source=source,
        dense=run.base,
        rows=rows.artifact,
        asked=_training(run),
        device=run.device,
    ).on_gpu()


def quantize(run: Run, source: Artifact, calibration: StageResult[CalibrationRows]) -> Stage[QuantizedCheckpoint]:
    return Stage.of(
        "quantize",
        "export",
        make_quantized,
        source=source,
        dense=run.base,
        rows=calibration.artifact,
        asked=run.recipe.quantize,
        device=run.device,
    ).on_gpu()
