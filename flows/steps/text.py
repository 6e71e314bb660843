"""The recipe's text or images as rows, and rows on disk.

Text needs a tokenizer; for a model that reads images it is None.
"""

import hashlib
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from numprune.anatomy import read_anatomy
from numprune.blocks import Anatomy
from numprune.chat import renderer
from numprune.corpus import TokenRows, rows_digest, sample_rows
from numprune.counted import counted
from numprune.documents import Document, Reading, content_of, read_documents
from numprune.errors import InputError
from numprune.export.checkpoint import load_tokenizer, read_config
from numprune.export.manifest import sha256_file
from numprune.export.tasks import AnyTask, load_task
from numprune.flows.embedded import corpus
from numprune.flows.names import EMBEDDED, SEQUENCE_LENGTH
from numprune.flows.steps.results import CalibrationRows, HeldoutRows
from numprune.images import draw_pictures
from numprune.pictures import Picture, read_pictures
from numprune.plans import Draw
from numprune.tasks import CAUSAL, MINIMUM_DOCUMENTS, Task
from numprune.tasks.image_classification import ImageClassification

logger = logging.getLogger(__name__)

Text = str | Sequence[str | Path]  # "embedded", or files

_FILE = "rows.safetensors"
_HELDOUT = "heldout.safetensors"
# Only as much of the embedded text is read as needed: about four times the tokens drawn.
_CHARACTERS_PER_TOKEN = 12


def text_digest(text: Text, part: corpus.Split) -> str:
    """The identity of a recipe's text: its files, or interpreter and reader of the embedded text."""
    if text == EMBEDDED:
        parts = [sys.version, part, sha256_file(Path(corpus.__file__))]
    else:
        # File names are included: they name the documents, and the suffix decides how a file is read.
        # Those of images contain their class.
        files = [(file.parent, one) for file in map(Path, text) for one in content_of(file)]
        parts = [word for parent, one in files for word in (str(one.relative_to(parent)), sha256_file(one))]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def require_held_out(heldout: Text, calibration: Text, field: str) -> None:
    """Refuse held-out files, also those in folders, that are calibrated on, too. Raises InputError.

    `field`: that names the calibration text in the message.
    """
    judged, calibrated_on = _files(heldout), _files(calibration)
    sizes = {file.stat().st_size for file in judged}
    found = {sha256_file(file): file for file in calibrated_on if file.stat().st_size in sizes}
    copies = [(file, found[digest]) for file in judged if (digest := sha256_file(file)) in found] if found else []
    if copies:
        raise InputError(
            f"{counted(len(copies), 'file')} also in {field}, so not held out; {copies[0][0]} is the same as "
            f"{copies[0][1]}"
        )


def _files(text: Text) -> list[Path]:
    """Return the files of a text, without those that are missing."""
    given = [] if text == EMBEDDED else map(Path, text)
    return [file for path in given for file in content_of(path) if file.is_file()]


def read_text(
    text: Text, part: corpus.Split, tokenizer: PreTrainedTokenizerBase, reading: Reading, tokens: int | None = None
) -> list[Document]:
    """The documents of a recipe's text; for the embedded text, enough for `tokens`, or all. Raises InputError."""
    if text == EMBEDDED:
        return _embedded(part, tokens)
    return read_documents(text, reading.split, renderer(tokenizer) if reading.chat else None)


def read_images(text: Text, reading: Reading) -> list[Picture]:
    """The images of a recipe's text. Raises InputError, also for settings that are for text."""
    if text == EMBEDDED:
        raise InputError("the model reads images, and the embedded text has none; give folders of images")
    if reading != Reading():
        raise InputError("split, chat and pack are for text, and the model reads images; omit them")
    return read_pictures(text)


def text_rows(
    text: Text,
    part: corpus.Split,
    tokenizer: PreTrainedTokenizerBase | None,
    length: int,
    reading: Reading,
    tokens: int | None = None,
    task: AnyTask = CAUSAL,
) -> TokenRows:
    """A recipe's text or images as rows for a task; the other arguments are `read_text`'s. Raises InputError."""
    if isinstance(task, ImageClassification):
        pictures = read_images(text, reading)
        rows = task.rows(pictures, judged=part == "heldout")
        if copies := len(pictures) - len(rows.rows):
            logger.warning(
                "%s of held-out images, with the same pixels and label; each image counts once",
                counted(copies, "duplicate"),
            )
        logger.info(
            "%s images: %d%s",
            "calibration" if part == "train" else "held-out",
            len(rows.rows),
            "" if rows.labels is None else ", labelled",
        )
        return rows
    assert tokenizer is not None  # of a model that reads text
    read = task.calibration_rows if part == "train" else task.heldout_rows
    rows = read(read_text(text, part, tokenizer, reading, tokens), tokenizer, length, reading.pack)
    logger.info(
        "%s text: %s, %s of %d tokens%s",
        "calibration" if part == "train" else "held-out",
        counted(len(rows.names), "document"),
        counted(len(rows.rows), "packed row" if rows.packed else "row"),
        length,
        "" if rows.packed else " or less",
    )
    return rows


def _embedded(part: corpus.Split, tokens: int | None) -> list[Document]:
    documents: list[Document] = []
    characters = 0
    for name, content in corpus.documents(part):
        documents.append(Document(name, content))
        characters += len(content)
        if tokens is not None and characters >= tokens * _CHARACTERS_PER_TOKEN:
            break
    return documents


def row_length(asked: int | None, anatomy: Anatomy) -> int:
    """The requested sequence length, by default `SEQUENCE_LENGTH` but at most the context. Raises InputError."""
    if asked is not None and anatomy.image is not None:
        raise InputError(f"--sequence-length {asked}: the model reads images, which all have one size; omit it")
    if asked is not None and asked > anatomy.context:
        raise InputError(f"--sequence-length {asked}: the model takes at most {anatomy.context} tokens")
    return asked or min(SEQUENCE_LENGTH, anatomy.context)


def heldout_rows(
    files: Sequence[Path], length: int | None, models: Sequence[Path], reading: Reading, baseline: Path | None = None
) -> TokenRows:
    """The text as rows for models and, if given, their baseline.

    Args:
        length: see `row_length`.

    Raises InputError: as `read_documents` and `token_rows` do, and if their tokenizers differ on the text.
    """
    model, *others = models
    length = row_length(length, read_anatomy(read_config(model)))
    task, further = load_task(model), [*others, *([baseline] if baseline else [])]
    for other in further:
        if load_task(other) != task:
            raise InputError(
                f"{model} and {other}: they have different tasks, classes, pooling or image processors, so they cannot "
                "be compared"
            )
    if isinstance(task, ImageClassification):
        return text_rows(files, "heldout", None, length, reading, task=task)
    tokenizer = load_tokenizer(model)
    documents = read_text(files, "heldout", tokenizer, reading)
    rows = task.heldout_rows(documents, tokenizer, length, reading.pack)
    for other in further:
        if task.heldout_rows(documents, load_tokenizer(other), length, reading.pack).digest != rows.digest:
            raise InputError(
                f"{model} and {other}: their tokenizers give different tokens for the text, so they cannot be "
                "compared; the baseline must be the model that the other was made from"
            )
    if baseline is not None:
        warn_of_windows(rows, "--split")
    return rows


def warn_of_windows(rows: TokenRows, option: str) -> None:
    """Warn if the text has too few documents for an interval over documents."""
    if rows.documents < MINIMUM_DOCUMENTS:
        logger.warning(
            "the held-out text has %s, so intervals are over its %s: they are similar and say little about other text; "
            "separate its documents (%s: blank-line, or a regular expression) or give at least %d",
            counted(rows.documents, "document"),
            counted(len(rows.rows), "window"),
            option,
            MINIMUM_DOCUMENTS,
        )


def calibration_rows(
    text: Text,
    tokenizer: PreTrainedTokenizerBase | None,
    samples: int,
    length: int,
    seed: int,
    reading: Reading,
    option: str = "--samples",
    task: AnyTask = CAUSAL,
) -> tuple[Tensor, Draw]:
    """(samples, length) token rows, or images, drawn from a recipe's text, and their description for a plan.

    `option` is the user's name for `samples`. Raises InputError.
    """
    if isinstance(task, ImageClassification):
        found = read_images(text, reading)
        with named(option):
            drawn = draw_pictures(found, samples, seed)
        return torch.stack(task.rows(drawn).rows), draw_of(text, seed, reading, packed=False)
    rows = text_rows(text, "train", tokenizer, length, reading, samples * length, task)
    return draw_rows(rows, samples, length, seed, option), draw_of(text, seed, reading, packed=rows.packed)


def draw_of(text: Text, seed: int, reading: Reading, *, packed: bool) -> Draw:
    """Return a plan's record of rows drawn from the calibration text."""
    names = [f"{EMBEDDED}:train"] if text == EMBEDDED else [Path(file).name for file in text]
    return Draw(text=names, seed=seed, split=reading.split, chat=reading.chat, packed=packed)


def draw_rows(rows: TokenRows, samples: int, length: int, seed: int, option: str) -> Tensor:
    """Like `sample_rows`. Raises InputError naming `option`, the user's name of `samples`."""
    with named(option):
        return sample_rows(rows, samples, length, seed)


@contextmanager
def named(option: str) -> Iterator[None]:
    """Have an InputError name the option that it is about."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{option}: {error}") from None


def save_calibration(stage: Path, rows: Tensor, draw: Draw) -> CalibrationRows:
    """Write rows for `load_calibration`."""
    save_file({"rows": rows.contiguous()}, stage / _FILE, metadata={"draw": draw.model_dump_json()})
    return CalibrationRows(rows_digest(rows), rows.shape[0], rows.numel(), draw.packed)


def load_calibration(stage: Path) -> tuple[Tensor, Draw]:
    with safe_open(stage / _FILE, "pt") as file:
        return file.get_tensor("rows"), Draw.model_validate_json(file.metadata()["draw"])


def save_heldout(stage: Path, rows: TokenRows, task: Task = CAUSAL) -> HeldoutRows:
    """Write rows for `load_heldout`."""
    tensors = {
        "tokens": torch.cat(rows.rows),
        "lengths": torch.tensor([len(row) for row in rows.rows]),
        "document": torch.tensor(rows.document),
    }
    if rows.spans is not None:
        tensors["spans"] = torch.tensor([tokens for lengths in rows.spans for tokens in lengths])
        tensors["spans_of_row"] = torch.tensor([len(lengths) for lengths in rows.spans])
    if rows.labels is not None:
        tensors["labels"] = torch.tensor(rows.labels)
    save_file(tensors, stage / _HELDOUT)
    (stage / "names.json").write_text(json.dumps(rows.names), encoding="utf-8")
    return HeldoutRows(rows.digest, len(rows.rows), int(task.scored(rows).sum()), rows.documents, rows.packed)


def load_heldout(stage: Path, digest: str) -> TokenRows:
    """Read what `save_heldout` wrote; `digest` is from its result."""
    found = load_file(stage / _HELDOUT)
    spans = None
    if "spans" in found:
        spans = [part.tolist() for part in found["spans"].split(found["spans_of_row"].tolist())]
    return TokenRows(
        rows=list(found["tokens"].split(found["lengths"].tolist())),
        document=found["document"].tolist(),
        names=json.loads((stage / "names.json").read_text(encoding="utf-8")),
        digest=digest,
        spans=spans,
        labels=found["labels"].tolist() if "labels" in found else None,
    )
