"""Rows from text files, or from images, for the Python API."""

from collections.abc import Sequence
from pathlib import Path

from numprune.documents import Reading
from numprune.errors import InputError
from numprune.flows.in_memory import CalibrationRows, Model
from numprune.flows.steps import recover as recovering
from numprune.flows.steps import text as texts
from numprune.flows.steps import training
from numprune.recovery import RecoveryOptions, RecoveryRows
from numprune.tasks.image_classification import ImageClassification

Text = str | Path | Sequence[str | Path]


def calibration_rows(
    text: Text,
    model: Model,
    *,
    samples: int = 128,
    sequence_length: int | None = None,
    seed: int = 0,
    reading: Reading | None = None,
) -> CalibrationRows:
    """Draw rows of tokens, or images, for calibration.

    Args:
        text: one or more files; .jsonl, .json and .parquet files hold a document per record. For a model that reads
            images: folders of them, .parquet files, or folders saved by `datasets`.
        model: the model whose tokenizer and context, or image processor, are used.
        samples: N, how many rows.
        sequence_length: S, tokens per row; None: 512, or the model's context if shorter.
        seed: of the draw.
        reading: how documents are split, rendered and packed; None for the defaults.

    Raises:
        InputError: a file cannot be read, or there is too little text.
    """
    length = texts.row_length(sequence_length, model.anatomy)
    tokens, draw = texts.calibration_rows(
        files(text), model.tokenizer, samples, length, seed, reading or Reading(), task=model.task
    )
    return CalibrationRows(tokens, draw)


def recovery_rows(
    text: Text,
    model: Model,
    options: RecoveryOptions,
    *,
    heldout: Text | None = None,
    sequence_length: int | None = None,
    reading: Reading | None = None,
) -> RecoveryRows:
    """Draw rows of tokens for training, and others for choosing the best step.

    Args:
        text: as for `calibration_rows`.
        model: the model whose tokenizer and context are used.
        options: of the training; they determine the number of rows.
        heldout: held-out text: rows of which it contains more than half are left out.
        sequence_length: tokens per row; None: 512, or the model's context if shorter.
        reading: as for `calibration_rows`.

    Raises:
        InputError: a file cannot be read, a held-out document is in the text, or there is too little text.
    """
    if model.tokenizer is None or isinstance(model.task, ImageClassification):
        raise InputError("training reads text, and this model classifies images")
    length, how = texts.row_length(sequence_length, model.anatomy), reading or Reading()
    judged = []
    if heldout is not None:
        training.check_documents(files(text), files(heldout), model.tokenizer, how, "heldout")
        judged = [texts.text_rows(files(heldout), "heldout", model.tokenizer, length, how, task=model.task)]
    return recovering.training_rows(files(text), model.tokenizer, length, options, how, "text", judged, task=model.task)


def files(text: Text) -> list[Path]:
    return [Path(text)] if isinstance(text, str | Path) else [Path(file) for file in text]
