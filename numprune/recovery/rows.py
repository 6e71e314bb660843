"""The rows for training and selection, which must not occur in the held-out text."""

import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from numprune.corpus import Frame, TokenRows, rows_digest
from numprune.counted import counted
from numprune.documents import Document
from numprune.errors import InputError
from numprune.recovery.options import RecoveryOptions
from numprune.tasks import CAUSAL, Task
from numprune.tasks.masked import Masked

logger = logging.getLogger(__name__)

_SHOWN = 3  # names in a message
_RUN = 32  # tokens: longer than what different texts usually share by chance
_MOST_SHARED = 0.5  # of a window's runs
_CHUNK = 1 << 20  # tokens digested at a time
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplication by it is invertible


@dataclass(frozen=True)
class RecoveryRows:
    """Distinct windows of tokens.


    Attributes:
        training: (N, S) int64.
        selection: (M, S) int64, for choosing the best step.
    """

    training: Tensor
    selection: Tensor

    def __post_init__(self) -> None:
        shared = window_digests(self.training) & window_digests(self.selection)
        if shared:
            raise InputError(f"{len(shared)} selection rows are training rows; draw them from different text")

    @property
    def digest(self) -> str:
        """SHA-256 of all tokens."""
        return hashlib.sha256(f"{rows_digest(self.training)} {rows_digest(self.selection)}".encode()).hexdigest()


def draw_rows(
    texts: Sequence[TokenRows],
    length: int,
    options: RecoveryOptions,
    judged: Sequence[TokenRows] = (),
    task: Task = CAUSAL,
    frame: Frame | None = None,
) -> RecoveryRows:
    """Draw the training and selection rows that the options need; see `draw_windows`."""
    needed = options.steps(length) * options.batch_size
    return draw_windows(texts, length, needed, options.selection_rows, options.seed, judged, task, frame)


def draw_windows(
    texts: Sequence[TokenRows],
    length: int,
    training: int,
    selection: int,
    seed: int,
    judged: Sequence[TokenRows] = (),
    task: Task = CAUSAL,
    frame: Frame | None = None,
) -> RecoveryRows:
    """Draw training and selection rows from the distinct full windows of texts.

    All windows of a text are used before any of the next one, so a small text is used in full before a large one. If
    there are not enough windows, there are fewer training rows, which training repeats.

    Args:
        training, selection: number of rows.
        judged: held-out texts. A window is not drawn if one of them contains more than half of its runs of 32
            consecutive tokens, at any offset: an excerpt shares nearly all of them, a window with only the same licence
            header few.
        task: of the rows; those of a masked language model are masked after drawing.
        frame: special tokens around each row of the texts and held-out texts; they are not compared.

    Raises InputError if no training row is left.
    """
    unseen = [_unseen(text, judged, frame or Frame((), (), None)) for text in texts]
    drawn: list[Tensor] = []
    for windows in unseen:
        drawn += _shuffled(windows, length, seed)[: training + selection - len(drawn)]
    if len(texts) > 1:
        drawn = _shuffled(drawn, length, seed)
    if len(drawn) <= selection:
        every = sum(len(text.rows) for text in texts)
        outside = "" if sum(map(len, unseen)) == every else " that the held-out text does not have"
        raise InputError(
            f"the text has {counted(len(drawn), f'different window of {length} tokens')}{outside}, and {selection} "
            "selection rows leave none to train on; give more text or a shorter sequence length"
        )
    parts = [drawn[selection:], drawn[:selection]]
    if isinstance(task, Masked):  # not before, because masks hide what the judged text has
        parts = [[task.masked(index, row) for index, row in enumerate(part)] for part in parts]
    return RecoveryRows(*map(torch.stack, parts))


def _shuffled(rows: Iterable[Tensor], length: int, seed: int) -> list[Tensor]:
    """Return the distinct full windows among rows, (length,) each, in an order drawn with `seed`."""
    windows = list({_digest(row): row for row in rows if len(row) == length}.values())
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return [windows[index] for index in order.tolist()]


def _unseen(rows: TokenRows, judged: Sequence[TokenRows], frame: Frame) -> list[Tensor]:
    """Return the rows that no text to judge on has for more than half; a warning names what is left out."""
    seen: set[int] = set()
    plain = _without(frame, rows.rows)  # special tokens would end every run of the text, hiding it in short rows
    for text in judged:
        shares = shared_runs(plain, _without(frame, text.rows), min(_RUN, max(map(len, plain))))
        seen |= {row for row, share in enumerate(shares) if share > _MOST_SHARED}
    if seen:
        owners = zip(rows.row.tolist(), rows.document, strict=True)
        names = dict.fromkeys(rows.names[document] for row, document in owners if row in seen)
        logger.warning(
            "left out %s of the training text: the held-out text has more than half of each (%s)",
            counted(len(seen), "window"),
            _listed(names),
        )
    return [row for index, row in enumerate(rows.rows) if index not in seen]


def _without(frame: Frame, rows: Sequence[Tensor]) -> list[Tensor]:
    return [row[len(frame.prefix) : len(row) - len(frame.suffix)] for row in rows]


def shared_runs(rows: Sequence[Tensor], others: Sequence[Tensor], length: int) -> list[float]:
    """Return the share of each row's runs of `length` tokens that occur in the joined others; 0 for shorter rows."""
    wanted = np.unique(_run_digests(torch.cat(list(others)), length))
    text = torch.cat(list(rows))
    found = np.zeros(len(text) + 1, dtype=bool)  # at i + 1: whether the run at i is shared
    for start in range(0, len(text) if len(wanted) else 0, _CHUNK):
        digests = _run_digests(text[start : start + _CHUNK + length - 1], length)
        nearest = wanted[np.searchsorted(wanted, digests).clip(max=len(wanted) - 1)]
        found[start + 1 : start + 1 + len(digests)] = nearest == digests
    before = np.cumsum(found)  # shared runs before each place
    shares, start = [], 0
    for row in rows:
        runs = len(row) - length + 1  # none that ends in the next row
        shares.append(int(before[start + runs] - before[start]) / runs if runs > 0 else 0.0)
        start += len(row)
    return shares


def _run_digests(tokens: Tensor, length: int) -> NDArray[np.uint64]:
    """Return a polynomial of each run of `length` tokens, modulo 2^64, at all offsets (Karp and Rabin, 1987)."""
    values = tokens.to(torch.int64).numpy().view(np.uint64)
    digests = np.zeros(max(0, len(values) - length + 1), dtype=np.uint64)
    for place in range(length if len(digests) else 0):
        digests *= _BASE
        digests += values[place : place + len(digests)]
    return digests


def require_others(trained: Iterable[Document], judged: Iterable[Document]) -> None:
    """Raise InputError if a held-out document is also a training document, however windows cut it; names them.

    Blank ones are in neither text.
    """
    known = {document.text.strip() for document in trained} - {""}
    names = [document.name for document in judged if document.text.strip() in known]
    if names:
        raise InputError(
            f"{len(names)} of its documents {'is' if len(names) == 1 else 'are'} in the training text "
            f"({_listed(names)}); remove {'it' if len(names) == 1 else 'them'} from one of the two texts"
        )


def window_digests(rows: Iterable[Tensor]) -> set[bytes]:
    """Return the SHA-256 digests of the tokens of windows, (S,) each."""
    return {_digest(row) for row in rows}


def _digest(row: Tensor) -> bytes:
    return hashlib.sha256(row.to(torch.int64).contiguous().numpy().tobytes()).digest()


def _listed(names: Iterable[str]) -> str:
    shown: Sequence[str] = list(names)
    more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    return ", ".join(shown[:_SHOWN]) + more
