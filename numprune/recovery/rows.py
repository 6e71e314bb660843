"""The rows of training and of selection, which no text that the result is judged on may share."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from numprune.corpus import TokenRows, rows_digest
from numprune.counted import counted
from numprune.documents import Document
from numprune.errors import InputError
from numprune.recovery.options import RecoveryOptions

_SHOWN = 3  # names in an error
_RUN = 32  # tokens: longer than what different texts usually share by chance
_MOST_SHARED = 0.5  # of a window's runs
_CHUNK = 1 << 20  # tokens digested at a time
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd: a multiplication by it loses nothing


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


def require_unseen(trained: TokenRows, judged: TokenRows) -> None:
    """Raises InputError where more than half of a window to judge on is in the text to train on; names documents.

    That is more than half of the window's runs of 32 consecutive tokens, at whatever offset the training text has them:
    a verbatim excerpt has nearly all of its runs, a window that only shares a licence header has few. Digests of the
    runs are compared. Shorter windows are not.
    """
    length = min(_RUN, max(map(len, trained.rows)))
    shared = _shared_runs(trained.rows, judged.rows, length)
    leaked = {row for row, share in enumerate(shared) if share > _MOST_SHARED}
    if leaked:
        owners = zip(judged.row.tolist(), judged.document, strict=True)
        names = dict.fromkeys(judged.names[document] for row, document in owners if row in leaked)
        raise InputError(
            f"more than half of {len(leaked)} of its {counted(len(judged.rows), 'window')} is in the training text "
            f"({_listed(names)}); remove it from one of the two texts"
        )


def _shared_runs(trained: Sequence[Tensor], judged: Sequence[Tensor], length: int) -> list[float]:
    """Return the share of each judged row's runs of `length` tokens that the trained rows, joined, have as well."""
    lengths = np.array([len(row) for row in judged])
    wanted, places = np.unique(_run_digests(torch.cat(list(judged)), length), return_inverse=True)
    seen = np.zeros(len(wanted), dtype=bool)
    if len(wanted):
        text = torch.cat(list(trained))
        for start in range(0, len(text), _CHUNK):
            digests = _run_digests(text[start : start + _CHUNK + length - 1], length)
            found = np.searchsorted(wanted, digests).clip(max=len(wanted) - 1)
            seen[found[wanted[found] == digests]] = True
    counts = np.concatenate([[0], np.cumsum(seen[places])])  # of shared runs before each place
    first = np.cumsum(lengths) - lengths
    runs = lengths - length + 1  # of each row: none that ends in the next one
    return [
        float(counts[start + own] - counts[start]) / own if own > 0 else 0.0
        for start, own in zip(first, runs, strict=True)
    ]


def _run_digests(tokens: Tensor, length: int) -> NDArray[np.uint64]:
    """Return a polynomial of each run of `length` tokens, modulo 2^64, at all offsets (Karp and Rabin, 1987)."""
    values = tokens.to(torch.int64).numpy().view(np.uint64)
    digests = np.zeros(max(0, len(values) - length + 1), dtype=np.uint64)
    for place in range(length if len(digests) else 0):
        digests *= _BASE
        digests += values[place : place + len(digests)]
    return digests


def require_others(trained: Iterable[Document], judged: Iterable[Document]) -> None:
    """Raises InputError where a document to judge on is one to train on, wherever windows would cut it; names them.

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
