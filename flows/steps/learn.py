"""Derive a plan from a checkpoint by trained masks and, if the weights are trained, too, a new checkpoint."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from numprune.anatomy import read_anatomy
from numprune.budget import budget_of
from numprune.documents import Reading
from numprune.errors import InputError
from numprune.export import card, checkpoint, compressed_tensors, manifest
from numprune.export.tasks import load_task
from numprune.flows.steps.text import Text, draw_of, text_rows
from numprune.learning import SELECTION_ROWS, Record, Variant, check_learning, learn
from numprune.options import PruneOptions
from numprune.plans import Draw
from numprune.recovery.rows import shuffled_windows

PLAN = "plan.json"
MODEL = "model"  # the checkpoint with the trained weights


@dataclass(frozen=True)
class TrainingRows:
    """Windows of a text, no two alike.

    Attributes:
        training: (N, S) int64.
        selection: (SELECTION_ROWS, S): the masks are judged by them.
        draw: their origin.
    """

    training: Tensor
    selection: Tensor
    draw: Draw


@dataclass(frozen=True)
class Request:
    """How to train, as for `numprune.learning.learn`."""

    variant: Variant
    tokens: int
    learning_rate: float


@dataclass(frozen=True)
class LearnedCheckpoint:
    """What `learn_checkpoint` wrote.

    Attributes:
        digest: of the folder.
        model: the checkpoint that the plan is for.
        removed: share of its prunable parameters that the plan removes.
        record: of the training.
    """

    digest: str
    model: Path
    removed: float
    record: Record


def training_rows(text: Text, source: Path, length: int, tokens: int, seed: int, reading: Reading) -> TrainingRows:
    """Return as many windows of the text as `tokens` need, or as it has.

    Raises:
        InputError: as `text_rows`, or the text has too few windows.
    """
    task, tokenizer = load_task(source), checkpoint.load_tokenizer(source)
    wanted = -(-tokens // length) + SELECTION_ROWS
    rows = text_rows(text, "train", tokenizer, length, reading, wanted * length, task)
    windows = shuffled_windows(rows.rows, length, seed)[:wanted]
    if len(windows) <= SELECTION_ROWS:
        raise InputError(
            f"--text: it has {len(windows)} different windows of {length} tokens, and {SELECTION_ROWS} to judge by "
            "leave none to train on; give more text or a shorter --sequence-length"
        )
    drawn = torch.stack(windows)
    draw = draw_of(text, seed, reading, packed=rows.packed)
    return TrainingRows(drawn[SELECTION_ROWS:], drawn[:SELECTION_ROWS], draw)


def check_request(source: Path, options: PruneOptions) -> None:
    """Refuse what `learn_checkpoint` could not do. Raises InputError."""
    compressed_tensors.refuse_quantized(source, "learning")
    check_learning(read_anatomy(checkpoint.read_config(source)), options)


def learn_checkpoint(
    source: Path,
    rows: TrainingRows,
    options: PruneOptions,
    asked: Request,
    out: Path,
    device: torch.device,
) -> LearnedCheckpoint:
    """Write the plan for `source` to the new folder `out`; with trained weights, these and the plan for them.

    Raises:
        InputError: `out` exists, or the model, rows or options cannot be used.
        IntegrityError: a file is not what it should be.
    """
    check_request(source, options)
    digest = manifest.folder_digest(source)
    facts: dict[str, Any] = {"method": options.criterion, **asdict(asked), "seed": options.seed}
    with manifest.creating(out, kind="learned", parents={"base": digest}, facts={"learning": facts}) as folder:
        model, task = checkpoint.load(source)[0].to(device), load_task(source)
        found = learn(
            model,
            rows.training,
            rows.selection,
            options,
            asked.variant,
            asked.tokens,
            task,
            learning_rate=asked.learning_rate,
        )
        if found.model is not None:
            (folder / MODEL).mkdir()
            checkpoint.save_trained(found.model, source, folder / MODEL)
            card.set_training(folder / MODEL, f"with masks ({options.criterion}), on {found.record.tokens:,} tokens")
            digest = manifest.folder_digest(folder / MODEL)
        found.plan.drawn(rows.draw, digest).write(folder / PLAN)
    anatomy = read_anatomy(checkpoint.read_config(source))
    before, after = (budget_of(one).prunable_parameters for one in (anatomy, anatomy.keeping(found.plan.sizes())))
    return LearnedCheckpoint(
        digest=manifest.read(out).digest,
        model=source if found.model is None else out / MODEL,
        removed=1 - after / before,
        record=found.record,
    )
