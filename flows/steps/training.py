"""What stages that train share: rows on disk, disjoint texts, and state that outlives a killed process."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from numprune.corpus import Frame, TokenRows, token_rows
from numprune.documents import Document, Reading
from numprune.errors import InputError, IntegrityError, NumpruneError
from numprune.export import locks
from numprune.flows.names import TRAINING, TRAINING_LOCK
from numprune.flows.steps import text as texts
from numprune.flows.steps.results import RecoveryText
from numprune.recovery import RecoveryRows
from numprune.recovery.rows import require_others
from numprune.recovery.state import TrainingState
from numprune.tasks import CAUSAL, Task
from numprune.tasks.codes import ImageCodes
from numprune.tasks.reading import frame_of

_FILE = "rows.safetensors"


def unmasked_rows(
    text: texts.Text,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    reading: Reading,
    tokens: int,
    task: Task,
) -> tuple[TokenRows, Frame | None]:
    """Return the rows of a text to draw from, and the special tokens around each.

    Those of a masked language model are not masked yet, because masks would hide copies of held-out text.
    """
    documents = texts.read_text(text, "train", tokenizer, reading, tokens)
    if isinstance(task, ImageCodes):
        return task.calibration_rows(documents, tokenizer, length, reading.pack), None
    frame = None if task.name == CAUSAL.name else frame_of(tokenizer)
    return token_rows(documents, tokenizer, length, reading.pack, frame), frame


def save_rows(stage: Path, rows: RecoveryRows) -> RecoveryText:
    """Write rows for `load_rows`."""
    save_file({"training": rows.training, "selection": rows.selection}, stage / _FILE)
    return RecoveryText(rows.digest, len(rows.training), len(rows.selection), rows.training.numel())


def load_rows(stage: Path) -> RecoveryRows:
    return RecoveryRows(**load_file(stage / _FILE))


def check_documents(
    text: texts.Text,
    judged: texts.Text,
    tokenizer: PreTrainedTokenizerBase,
    reading: Reading,
    option: str,
    prompts: Sequence[Document] = (),
) -> None:
    """Raise InputError if both texts have a document; it names `option`, where `judged` is from, and the documents.

    `prompts`: documents that are also trained on.
    """
    trained, others = (texts.read_text(one, "train", tokenizer, reading) for one in (text, judged))
    with texts.named(option):
        require_others([*trained, *prompts], others)


@contextmanager
def kept_until_done(scratch: Path, asked: Any, what: str, *, writes: bool = True) -> Iterator[tuple[Path, str]]:
    """Give a folder in `scratch` for finished parts of a work, and the digest of `asked`, which decides its result.

    The folder goes when the work is over. If the process is killed or fails after a part is finished, it stays: the
    same work resumes there.

    Args:
        asked: as JSON.
        what: the work, in messages.
        writes: this process writes the parts; only one of those that share the work does.

    Raises:
        InputError: another process is doing the same work.
    """
    identity = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    folder = scratch / f"{TRAINING}{identity[:16]}"
    with alone_in(folder, what) if writes else nullcontext():
        try:
            yield folder, identity
        except NumpruneError:
            if writes and [path.name for path in folder.iterdir()] == [TRAINING_LOCK]:
                shutil.rmtree(folder)
            raise
        if writes:
            shutil.rmtree(folder)


@contextmanager
def resumable(scratch: Path, asked: Mapping[str, Any], *, writes: bool = True) -> Iterator[TrainingState]:
    """Give the state of the training that `asked` describes: a folder in `scratch`, which is removed at the end.

    It is kept if the process is killed or fails, unless the training would only fail again from it.

    Args:
        asked: everything that determines the result, as JSON.
        writes: whether this process saves the state; one of those that share a training does.

    Raises:
        InputError: another process is running the same training.
    """
    identity = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    state = TrainingState(scratch / f"{TRAINING}{identity[:16]}", identity)
    with alone_in(state.folder, "training") if writes else nullcontext():
        try:
            yield state
        except NumpruneError as error:
            # A training that diverged would do so again from its state.
            if writes and (isinstance(error, IntegrityError) or state.load() is None):
                shutil.rmtree(state.folder)
            raise
        if writes:
            shutil.rmtree(state.folder)


@contextmanager
def alone_in(folder: Path, what: str) -> Iterator[None]:
    """Hold the lock of a folder that keeps unfinished work; `what` it is of, in messages.

    Raises InputError if another process holds it.
    """
    try:
        with locks.held(folder / TRAINING_LOCK, timeout_s=0):
            yield
    except locks.Held:
        raise InputError(f"{folder}: another process is running the same {what}; wait for it or stop it") from None
