"""Derive a plan from a checkpoint by trained masks and, if the weights are trained, too, a new checkpoint."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic_core import to_jsonable_python

from numprune.anatomy import read_anatomy
from numprune.corpus import TokenRows
from numprune.documents import Reading
from numprune.export import card_changes, checkpoint, compressed_tensors, manifest
from numprune.export.tasks import load_task, load_text_task
from numprune.flows.names import LEARNED_MODEL, LEARNED_PLAN
from numprune.flows.sections import Learn, Prune
from numprune.flows.stages import code_version
from numprune.flows.steps import prune
from numprune.flows.steps.results import LearnedMasks
from numprune.flows.steps.text import Text, draw_of, named
from numprune.flows.steps.timed_prune import options_within_time
from numprune.flows.steps.training import resumable, unmasked_rows
from numprune.learning import SELECTION_ROWS, Counted, Learned, Variant, check_learning, learn
from numprune.options import PruneOptions
from numprune.plans import Draw
from numprune.recovery import RecoveryRows
from numprune.recovery.rows import draw_windows
from numprune.recovery.state import TrainingState
from numprune.served import AS_STORED, Served
from numprune.target import Target
from numprune.timings import TimingTable


@dataclass(frozen=True)
class Request:
    """How to train, as for `numprune.learning.learn`."""

    variant: Variant
    tokens: int
    learning_rate: float
    constraint: Counted = "parameters"


def request_of(asked: Learn, options: PruneOptions) -> Request:
    """Return the training options of a recipe with these pruning options."""
    constraint = implied_constraint(options) if asked.constraint == "auto" else asked.constraint
    return Request(asked.variant, asked.trained_tokens, asked.learning_rate, constraint)


def implied_constraint(options: PruneOptions) -> Counted:
    """Return what the budget of these options limits, bytes first; without one, the ratio is of parameters."""
    return "bytes" if options.budget else "milliseconds" if options.time_budget else "parameters"


def options_of(
    asked: Learn,
    limits: Mapping[str, Any],
    target: Target,
    base: Path,
    table: TimingTable | None = None,
    served: Served = AS_STORED,
) -> PruneOptions:
    """Return the pruning options of a recipe's masks on the model in `base`.

    Args:
        limits: the fields `names.LEARNED_LIMITS` of section prune.
        table: for a budget of time; `served`: how the model is whose time counts.

    Raises:
        InputError: as `options_within_time`.
    """
    section = Prune(**limits)
    if table is None:
        options = prune.options_of(section, target, base, "none")
    else:
        options = options_within_time(section, target, base, [table], served)
    return replace(options, criterion=asked.method, seed=asked.seed)


def training_rows(
    text: Text,
    source: Path,
    length: int,
    tokens: int,
    seed: int,
    reading: Reading,
    option: str,
    judged: Sequence[TokenRows] = (),
) -> tuple[RecoveryRows, Draw]:
    """Return the windows of the text for `tokens` tokens, or all it has, and their origin.

    Args:
        option: the user's name for the text.
        judged: as for `draw_windows`.

    Raises:
        InputError: the text cannot be read, or has too few windows.
    """
    task, tokenizer, wanted = load_task(source), checkpoint.load_tokenizer(source), -(-tokens // length)
    rows, frame = unmasked_rows(text, tokenizer, length, reading, (wanted + SELECTION_ROWS) * length, task)
    with named(option):
        drawn = draw_windows([rows], length, wanted, SELECTION_ROWS, seed, judged, task, frame)
    return drawn, draw_of(text, seed, reading, packed=rows.packed)


def check_request(source: Path, options: PruneOptions, constraint: Counted, length: int) -> None:
    """Refuse a request that `learn_checkpoint` does not support with rows of `length` tokens. Raises InputError."""
    compressed_tensors.refuse_quantized(source, "learning")
    load_text_task(source, "learning masks")
    check_learning(read_anatomy(checkpoint.read_config(source)), options, constraint, length)


def learn_checkpoint(
    source: Path,
    rows: RecoveryRows,
    draw: Draw,
    options: PruneOptions,
    asked: Request,
    out: Path,
    device: torch.device,
    scratch: Path,
) -> LearnedMasks:
    """Write the plan for `source` to the new folder `out`; with trained weights, these and the plan for them.

    Args:
        rows, draw: from `training_rows`.
        scratch: a folder for the state of a killed training; the same request resumes there.

    Raises:
        InputError: `out` exists, the model, rows or options cannot be used, or another process is running the same
            training.
        IntegrityError: a file is damaged, or the training diverged.
    """
    check_request(source, options, asked.constraint, rows.training.shape[1])
    model = None
    base = manifest.folder_digest(source)
    facts: dict[str, Any] = {"method": options.criterion, **asdict(asked), "seed": options.seed, "rows": rows.digest}
    where = {"device": device.type, "code": {**code_version("export")}}
    with resumable(scratch, {"base": base, "options": to_jsonable_python(options), **facts, **where}) as state:
        found = _learned(source, rows, options, asked, device, state)
        with manifest.creating(out, kind="learned", parents={"base": base}, facts={"learning": facts}) as folder:
            if found.model is not None:
                trained = folder / LEARNED_MODEL
                trained.mkdir()
                checkpoint.save_trained(found.model, source, trained)
                card_changes.set_training(
                    trained, f"with masks ({options.criterion}), on {found.record.tokens:,} tokens"
                )
                model = manifest.folder_digest(trained)
            found.plan.drawn(draw, model or base).write(folder / LEARNED_PLAN)
    return LearnedMasks(digest=manifest.read(out).digest, model=model, **asdict(found.record))


def _learned(
    source: Path,
    rows: RecoveryRows,
    options: PruneOptions,
    asked: Request,
    device: torch.device,
    state: TrainingState,
) -> Learned:
    model, task = checkpoint.load(source)[0].to(device), load_task(source)
    return learn(
        model,
        rows.training,
        rows.selection,
        options,
        asked.variant,
        asked.tokens,
        task,
        counted=asked.constraint,
        learning_rate=asked.learning_rate,
        state=state,
    )
