"""The bodies of the stages that read text and images: rows of calibration, of evaluation and of training."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from numprune.documents import Reading
from numprune.flows.sections import Learn, Recover
from numprune.flows.stages import Artifact, Text
from numprune.flows.steps.results import CalibrationRows, GeneratedText, HeldoutRows, LearningText, RecoveryText


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
