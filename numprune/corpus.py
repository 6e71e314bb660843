"""Convert documents to rows of tokens: windows of each document, or of all documents joined by a separator."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from numprune.counted import counted
from numprune.documents import Document
from numprune.errors import InputError

Pack = bool | Literal["auto"]


@dataclass(frozen=True)
class Frame:
    """The special tokens of an encoder's rows.

    Attributes:
        prefix, suffix: at the ends of each row.
        separator: between the documents of a packed row; None: the tokenizer has no token for it.
    """

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    separator: int | None


@dataclass(frozen=True)
class TokenRows:
    """Consecutive windows of tokens: each of one document, or, *packed*, of all documents joined by a separator.

    For a model of images, each row has the pixel values of one image, which is its document.

    The part of a row that comes from one document is a *span*. A causal model is scored at all tokens of a row except
    the first, whichever document they belong to. A separator (EOS, or an encoder's [SEP]) belongs to the document that
    it ends; an encoder's special tokens at the ends of a row belong to the adjacent documents.

    Attributes:
        rows: (S',) int64 each; S' is the sequence length, or less in the last row of a document (if packed, of all).
            Images: (C, height, width) float32 each.
        document: index of each span's document, row by row.
        names: of the documents.
        digest: SHA-256 of the tokens, the document boundaries, and whether they are packed.
        spans: number of tokens of each span, by row; None if the rows are not packed: each row is then one span.
        labels: class of each document; None if they have none.
    """

    rows: list[Tensor]
    document: list[int]
    names: list[str]
    digest: str
    spans: list[list[int]] | None = None
    labels: list[int] | None = None

    @property
    def packed(self) -> bool:
        return self.spans is not None

    @property
    def tokens(self) -> int:
        """Number of tokens at which a causal model is scored, or of images."""
        return int(self.scored.sum())

    @property
    def documents(self) -> int:
        """Number of documents with scored tokens."""
        return len(np.unique(np.array(self.document)[self.scored > 0]))

    @cached_property
    def scored(self) -> np.ndarray:
        """(spans,) int64: tokens at which a causal model is scored."""
        return np.array([part.stop - part.start for parts in self._parts for part in parts], dtype=np.int64)

    @cached_property
    def row(self) -> np.ndarray:
        """(spans,) int64: index of each span's row."""
        return np.repeat(np.arange(len(self.rows)), [len(parts) for parts in self._parts])

    def add(self, sums: np.ndarray, rows: Sequence[int], values: np.ndarray) -> None:
        """Add values of scored tokens, (n, S' - 1) of these `rows`, to the `sums` (spans,) of their spans."""
        for index, of_row in zip(rows, values, strict=True):
            for span, part in enumerate(self._parts[index], start=self._first_span[index]):
                sums[span] += of_row[part].sum()

    def add_at(
        self, sums: np.ndarray, rows: Sequence[int], positions: Sequence[np.ndarray], values: np.ndarray
    ) -> None:
        """Add values (n, P) at some `positions` (P,) of each of these `rows` to the `sums` (spans,) of their spans."""
        for index, at, of_row in zip(rows, positions, values, strict=True):
            ends = np.cumsum([len(self.rows[index])] if self.spans is None else self.spans[index])
            np.add.at(sums, self._first_span[index] + np.searchsorted(ends, at, side="right"), of_row)

    def first_of_each_document(self) -> "TokenRows":
        """Return only the first row of each document; the rows must not be packed."""
        first = np.unique(self.document, return_index=True)[1].tolist()
        return replace(
            self,
            rows=[self.rows[index] for index in first],
            document=[self.document[index] for index in first],
            digest=hashlib.sha256(f"{self.digest} first".encode()).hexdigest(),
        )

    def part(self, rows: slice) -> "TokenRows":
        """Return only these rows."""
        first = [*self._first_span, len(self.document)]
        start, stop, _ = rows.indices(len(self.rows))
        return TokenRows(
            self.rows[rows],
            self.document[first[start] : first[stop]],
            self.names,
            hashlib.sha256(f"{self.digest} {rows.start}:{rows.stop}".encode()).hexdigest(),
            self.spans and self.spans[rows],
            self.labels,
        )

    @cached_property
    def _parts(self) -> list[list[slice]]:
        """Each row's spans, as slices of its scored tokens; that of a single first token is empty."""
        if self.spans is None:
            return [[slice(0, len(row) - 1 if row.dim() == 1 else 1)] for row in self.rows]
        ends = ([0, *(end - 1 for end in accumulate(lengths))] for lengths in self.spans)
        return [[slice(*pair) for pair in pairwise(end)] for end in ends]

    @cached_property
    def _first_span(self) -> list[int]:
        return [0, *accumulate(map(len, self._parts))][:-1]


def token_rows(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    pack: Pack = "auto",
    frame: Frame | None = None,
) -> TokenRows:
    """Return the documents' tokens in consecutive windows of `length`, no overlap.

    Unpacked, each document is cut separately; its last window may be shorter, and is left out if it has a single token,
    which cannot be scored. Packed, all documents that are not blank are joined by EOS and cut as one text, in order;
    attention spans the whole row, so a document sees the end of the preceding one. No special tokens are added except
    those of a `frame`.

    Args:
        documents: in the order in which they are packed.
        tokenizer: the model's.
        length: tokens of a row.
        pack: "auto" packs if the tokenizer has an EOS token and full windows of single documents would contain less
            than half of the tokens.
        frame: an encoder's special tokens; None: a causal model's rows, which have none.

    Raises:
        InputError: `length` is too short to score a token, no document is long enough, or there is no token to join
            documents with.
    """
    missing = "EOS" if frame is None else "separator"
    frame = frame or Frame((), (), tokenizer.eos_token_id)
    around = len(frame.prefix) + len(frame.suffix)
    room = length - around
    if length < 2 or room < 1:
        raise InputError(f"sequence length is {length}; at least {max(2, around + 1)} tokens are needed to score one")
    if not documents:
        raise InputError("no text: give at least one text file")
    if images := [document.name for document in documents if document.codes]:
        raise InputError(f"{images[0]}: has codes of an image, but the model reads text; give text")
    if pack is True and frame.separator is None:
        raise InputError(f"pack: the tokenizer has no {missing} token to join documents with; omit it")
    # verbose=False: a document is meant to be longer than the model's context here.
    encoded = tokenizer([document.text for document in documents], add_special_tokens=False, verbose=False)["input_ids"]
    names = [document.name for document in documents]
    if pack == "auto":
        pack = frame.separator is not None and _are_short(list(map(len, encoded)), room)
    if pack:
        assert frame.separator is not None
        kept = [index for index, document in enumerate(documents) if document.text.strip()]
        return _packed(kept, [encoded[index] for index in kept], names, frame, frame.separator, room)
    return _apart(encoded, names, frame, room)


def _are_short(lengths: Sequence[int], length: int) -> bool:
    """Return whether full windows of single documents would contain less than half of the tokens."""
    return len(lengths) > 1 and 2 * sum(tokens - tokens % length for tokens in lengths) < sum(lengths)


def _apart(encoded: Sequence[list[int]], names: list[str], frame: Frame, room: int) -> TokenRows:
    rows: list[Tensor] = []
    owner: list[int] = []
    digest = hashlib.sha256()
    for index, ids in enumerate(encoded):
        tokens = torch.tensor(ids, dtype=torch.int64)
        digest.update(len(ids).to_bytes(8, "little"))
        digest.update(tokens.numpy().tobytes())
        for part in tokens.split(room):
            row = _framed(part, frame)
            if len(part) and len(row) > 1:
                rows.append(row)
                owner.append(index)
    _finish(digest, frame, room)
    return TokenRows(_required(rows), owner, names, digest.hexdigest())


def _packed(
    kept: Sequence[int], encoded: Sequence[list[int]], names: list[str], frame: Frame, separator: int, room: int
) -> TokenRows:
    """Return the rows of the documents with the indices `kept`."""
    # A conversation may end with EOS already.
    joined = [ids if ids[-1:] == [separator] else [*ids, separator] for ids in encoded[:-1]] + list(encoded[-1:])
    tokens = torch.tensor([token for ids in joined for token in ids], dtype=torch.int64)
    owner = torch.tensor([index for index, ids in zip(kept, joined, strict=True) for _ in ids], dtype=torch.int64)
    digest = hashlib.sha256(b"packed")
    digest.update(json.dumps([len(ids) for ids in joined]).encode())
    digest.update(tokens.numpy().tobytes())
    _finish(digest, frame, room)
    framed = [_framed(part, frame) for part in tokens.split(room)]
    rows = _required([row for row in framed if len(row) > 1])
    document: list[int] = []
    spans: list[list[int]] = []
    for part in owner.split(room)[: len(rows)]:
        found, counts = part.unique_consecutive(return_counts=True)
        counts[0] += len(frame.prefix)
        counts[-1] += len(frame.suffix)
        document += found.tolist()
        spans.append(counts.tolist())
    return TokenRows(rows, document, names, digest.hexdigest(), spans)


def _framed(tokens: Tensor, frame: Frame) -> Tensor:
    return torch.cat([tokens.new_tensor(frame.prefix), tokens, tokens.new_tensor(frame.suffix)])


def _finish(digest: Any, frame: Frame, room: int) -> None:
    """Add the row structure to a digest of tokens."""
    digest.update(room.to_bytes(8, "little"))
    if frame.prefix or frame.suffix:
        digest.update(json.dumps([frame.prefix, frame.suffix]).encode())


def _required(rows: list[Tensor]) -> list[Tensor]:
    """Return `rows`. Raises InputError if there are none."""
    if not rows:
        raise InputError("the text has no document of at least two tokens; give files with more text")
    return rows


def sample_rows(rows: TokenRows, samples: int, length: int, seed: int) -> Tensor:
    """Return (samples, length) int64: full windows drawn without replacement with `seed`.

    Raises:
        InputError: there are fewer full windows than requested; says how many there are.
    """
    full = [row for row in rows.rows if len(row) == length]
    if samples < 1:
        raise InputError(f"samples is {samples}; calibration needs at least 1")
    if len(full) < samples:
        packing = "" if rows.packed or len(rows.names) < 2 else "packed documents, "
        raise InputError(
            f"the calibration text gives {counted(len(full), f'window of {length} tokens')}, but {samples} samples "
            f"were requested; give more text, {packing}fewer samples or a shorter sequence length"
        )
    order = torch.randperm(len(full), generator=torch.Generator().manual_seed(seed))[:samples]
    return torch.stack([full[index] for index in order.tolist()])


def rows_digest(rows: Tensor) -> str:
    """Return the SHA-256 of tokens or images (shape and values), as recorded in the plan and the report."""
    digest = hashlib.sha256(json.dumps(list(rows.shape)).encode())
    values = rows if rows.is_floating_point() else rows.to(torch.int64)
    digest.update(values.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()
