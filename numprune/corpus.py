"""Text files to rows of tokens. Documents are kept apart: no row crosses from one into the next."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from numprune.errors import InputError


@dataclass(frozen=True)
class Document:
    name: str
    text: str


@dataclass(frozen=True)
class TokenRows:
    """Consecutive windows of each document's tokens.

    Attributes:
        rows: (S',) int64 each; S' is the sequence length, less in a document's last row.
        document: index of each row's document.
        names: of the documents.
        digest: SHA-256 of the tokens and of where the documents end.
    """

    rows: list[Tensor]
    document: list[int]
    names: list[str]
    digest: str

    @property
    def tokens(self) -> int:
        return sum(len(row) for row in self.rows)


def read_documents(files: Iterable[Path | str]) -> list[Document]:
    """Return the documents of `files`: a line of a `.jsonl` file (its field "text") each, any other file is one.

    Raises:
        InputError: a file is missing, empty, not UTF-8, or a line is not what it should be; names file and line.
    """
    documents: list[Document] = []
    for file in map(Path, files):
        try:
            text = file.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise InputError(f"text file {str(file)!r} does not exist") from None
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"text file {str(file)!r} cannot be read as UTF-8 text: {error}") from None
        if not text.strip():
            raise InputError(f"text file {str(file)!r} is empty")
        if file.suffix == ".jsonl":
            documents.extend(_json_lines(file, text))
        else:
            documents.append(Document(file.name, text))
    return documents


def _json_lines(file: Path, text: str) -> Iterable[Document]:
    # Not splitlines(): JSON strings may hold U+2028 and its like unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{file.name}:{number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{file}: line {number} is not JSON ({str(error)[:200]})") from None
        value = record.get("text") if isinstance(record, dict) else None
        if not isinstance(value, str):
            raise InputError(f'{file}: line {number} must be an object with a string field "text"')
        name = record.get("name", where)
        if not isinstance(name, str):
            raise InputError(f'{file}: line {number}: its field "name" must be a string')
        if not (_is_text(value) and _is_text(name)):
            raise InputError(f"{file}: line {number} has half of a surrogate pair, which is no text")
        yield Document(name, value)


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def token_rows(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, length: int) -> TokenRows:
    """Return the documents' tokens in consecutive windows of `length`, no overlap, no special tokens added.

    A document's last window may be shorter; one of a single token scores nothing and is left out.

    Raises:
        InputError: `length` is under 2, or no document has two tokens.
    """
    if length < 2:
        raise InputError(f"sequence length is {length}; at least 2 tokens are needed, to score one")
    if not documents:
        raise InputError("no text: give at least one text file")
    # verbose=False: a document is meant to be longer than the model's context here.
    encoded = tokenizer([document.text for document in documents], add_special_tokens=False, verbose=False)["input_ids"]
    rows: list[Tensor] = []
    owner: list[int] = []
    digest = hashlib.sha256()
    for index, ids in enumerate(encoded):
        tokens = torch.tensor(ids, dtype=torch.int64)
        digest.update(len(ids).to_bytes(8, "little"))
        digest.update(tokens.numpy().tobytes())
        for row in tokens.split(length):
            if len(row) > 1:
                rows.append(row)
                owner.append(index)
    if not rows:
        raise InputError("the text has no document of at least two tokens; give files with more text")
    digest.update(length.to_bytes(8, "little"))
    return TokenRows(rows, owner, [document.name for document in documents], digest.hexdigest())


def sample_rows(rows: TokenRows, samples: int, length: int, seed: int) -> Tensor:
    """Return (samples, length) int64: full windows drawn without replacement with `seed`.

    Raises:
        InputError: there are fewer full windows than asked for; says how many there are.
    """
    full = [row for row in rows.rows if len(row) == length]
    if samples < 1:
        raise InputError(f"samples is {samples}; calibration needs at least 1")
    if len(full) < samples:
        raise InputError(
            f"the calibration text gives {len(full)} windows of {length} tokens, but {samples} samples were asked for; "
            f"give more text, fewer samples or a shorter sequence length"
        )
    order = torch.randperm(len(full), generator=torch.Generator().manual_seed(seed))[:samples]
    return torch.stack([full[index] for index in order.tolist()])


def rows_digest(rows: Tensor) -> str:
    """Return the SHA-256 of a token tensor (shape and values): what the plan and the report record."""
    digest = hashlib.sha256(json.dumps(list(rows.shape)).encode())
    digest.update(rows.to(torch.int64).contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()
