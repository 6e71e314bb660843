"""The rows of training and of selection, which no text that the result is judged on may share."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from numprune.corpus import TokenRows, rows_digest
from numprune.documents import Document
from numprune.errors import InputError
from numprune.recovery.options import RecoveryOptions

_SHOWN = 3  # names in an error


@dataclass(frozen=True)
class RecoveryRows:
    """Windows of tokens, no two alike.

    Attributes:
        training: (N, S) int64.
        selection: (M, S) int64: the best step is chosen on them.
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


def draw_rows(rows: TokenRows, length: int, options: RecoveryOptions) -> RecoveryRows:
    """Draw training and selection rows from the full windows of a text, each different window once.

    Where the text has fewer windows than `options.tokens` need, training goes over them several times.

    Raises InputError where there is not even one to train on.
    """
    drawn, wanted = shuffled_windows(rows, length, options.seed), options.selection_rows
    if len(drawn) <= wanted:
        raise InputError(
            f"the text has {len(drawn)} different windows of {length} tokens, and {wanted} selection rows leave none "
            "to train on; give more text, fewer selection rows or a shorter sequence length"
        )
    needed = options.steps(length) * options.batch_size
    return RecoveryRows(torch.stack(drawn[wanted : wanted + needed]), torch.stack(drawn[:wanted]))


def shuffled_windows(rows: TokenRows, length: int, seed: int) -> list[Tensor]:
    """Return the full windows of a text, (length,) each, in an order drawn with `seed`; of like ones the last."""
    windows = list({_digest(row): row for row in rows.rows if len(row) == length}.values())
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return [windows[index] for index in order.tolist()]


def require_unseen(rows: RecoveryRows, judged: TokenRows) -> None:
    """Raises InputError where a window that the result is judged on is one of training or selection; names documents.

    Windows are compared by the digests of their tokens.
    """
    seen = window_digests(rows.training) | window_digests(rows.selection)
    shared = {index for index, row in enumerate(judged.rows) if _digest(row) in seen}
    if shared:
        owners = zip(judged.row.tolist(), judged.document, strict=True)
        names = dict.fromkeys(judged.names[document] for row, document in owners if row in shared)
        raise InputError(
            f"{len(shared)} of its {len(judged.rows)} windows are in the training text ({_listed(names)}); remove them "
            "from one of the two texts"
        )


def require_others(trained: Iterable[Document], judged: Iterable[Document]) -> None:
    """Raises InputError where a document to judge on is one to train on, wherever windows would cut it; names them."""
    known = {document.text.strip() for document in trained}
    names = [document.name for document in judged if document.text.strip() in known]
    if names:
        raise InputError(
            f"{len(names)} of its documents are in the training text ({_listed(names)}); remove them from one of the "
            "two texts"
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
