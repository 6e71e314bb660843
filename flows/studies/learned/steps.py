"""The stages of the study that a recipe's run has otherwise or not at all: rows, pruning by the clock, divergence."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from numprune.corpus import TokenRows, rows_digest
from numprune.documents import Reading
from numprune.export import checkpoint
from numprune.flows.sections import Learn, Prune, Recover
from numprune.flows.stages import Artifact, Text
from numprune.flows.steps import learn, recover
from numprune.flows.steps.bodies import candidate as candidate_bodies
from numprune.flows.steps.results import CalibrationRows, HeldoutRows, LearningText, PrunedCheckpoint, RecoveryText
from numprune.flows.steps.text import calibration_rows, load_heldout, save_calibration, save_heldout, text_rows
from numprune.flows.steps.training import load_rows, save_rows
from numprune.recovery.loss import Distillation
from numprune.target import Target

# The folders of `make_text`.
CALIBRATION, HELDOUT, DISTILLATION = "calibration", "heldout", "distillation"


@dataclass(frozen=True)
class StudiedText:
    """The rows in the folders of `make_text`; `distillation`: if anything is distilled."""

    calibration: CalibrationRows
    heldout: HeldoutRows
    distillation: RecoveryText | None


@dataclass(frozen=True)
class Pruned:
    """A pruned model, and the seconds it took."""

    checkpoint: PrunedCheckpoint
    seconds: float


def make_text(
    out: Path,
    *,
    model: Artifact,
    text: Text,
    heldout: Text,
    samples: int,
    windows: int,
    sequence_length: int,
    distilled: Recover | None,
) -> StudiedText:
    """Draw the rows for calibration, for evaluation (at most `windows`), and for distillation if there is one."""
    tokenizer, folders = checkpoint.load_tokenizer(model.path), [CALIBRATION, HELDOUT, DISTILLATION]
    for name in folders:
        (out / name).mkdir()
    calibration = calibration_rows(text.source, tokenizer, samples, sequence_length, 0, Reading())
    read = text_rows(heldout.source, "heldout", tokenizer, sequence_length, Reading(), windows * sequence_length)
    judged, rows = read.part(slice(windows)), None
    if distilled is not None:
        options, option = recover.options_of(distilled), "--calibration"
        drawn = recover.training_rows(text.source, tokenizer, sequence_length, options, Reading(), option, [judged])
        rows = save_rows(out / DISTILLATION, drawn)
    return StudiedText(save_calibration(out / CALIBRATION, *calibration), save_heldout(out / HELDOUT, judged), rows)


def make_learning_rows(
    out: Path,
    *,
    model: Artifact,
    text: Text,
    heldout: Artifact,
    distilled: Artifact | None,
    asked: Learn,
    sequence_length: int,
) -> LearningText:
    """Draw the rows that masks are trained on: none of those that models are evaluated or chosen on."""
    judged = [load_heldout(heldout.path, heldout.digest), *_selection(distilled)]
    rows, draw = learn.training_rows(
        text.source, model.path, sequence_length, asked.trained_tokens, asked.seed, Reading(), "--calibration", judged
    )
    return LearningText(**asdict(save_rows(out, rows)), draw=draw)


def _selection(distilled: Artifact | None) -> Sequence[TokenRows]:
    if distilled is None:
        return []
    rows = load_rows(distilled.path).selection
    return [TokenRows(list(rows), [0] * len(rows), ["selection"], rows_digest(rows))]


def make_pruned(
    out: Path,
    *,
    base: Artifact,
    origin: Artifact,
    rows: Artifact,
    learned: Artifact | None,
    asked: Prune,
    device: str,
) -> Pruned:
    """Prune as in a run, by a learned plan if there is one, and take the time."""
    started = time.perf_counter()
    found = candidate_bodies.make_pruned(
        out,
        base=base,
        origin=origin,
        rows=rows,
        learned=learned,
        asked=asked,
        target=Target(),
        scheme="none",
        device=device,
    )
    return Pruned(found, time.perf_counter() - started)


@torch.no_grad()
def make_divergence(out: Path, *, candidate: Artifact, dense: Artifact, rows: Artifact, device: str) -> float:
    """Return the KL divergence from the dense model on the rows that distillation is selected by."""
    ours, theirs = (checkpoint.load(model.path)[0].to(device) for model in (candidate, dense))
    return float(Distillation(ours, theirs)(load_rows(rows.path).selection.to(device)))
