"""Read documents from files: plain text, JSON Lines, JSON arrays, Parquet, folders saved by `datasets`, and arrays.

A document is a text or, for an image generator, the codes of an image. Formats of other things are refused by name; a
file of unknown format is never read as text.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from numprune import arrays, arrow
from numprune.errors import InputError
from numprune.pictures import files_of, require_distinct

# Renders a record's messages and tools as text: see `chat.renderer`.
Render = Callable[[list[dict[str, Any]], list[Any] | None], str]

WHOLE_FILE = "file"
BLANK_LINE = "blank-line"
_LINES = (".jsonl", ".ndjson")
_FIELDS = ("text", "codes", "messages", "tools", "name", "label")


@dataclass(frozen=True)
class _Foreign:
    """A kind of file that is not plain text: how it is recognized by name and first bytes, and the remedy."""

    what: str
    suffixes: tuple[str, ...]
    magic: tuple[bytes, ...]
    remedy: str


_FOREIGN = (
    _Foreign(
        "compressed",
        (".gz", ".tgz", ".zst", ".bz2", ".xz", ".lz4", ".zip", ".tar", ".7z", ".rar"),
        (b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ\x00", b"\x04\x22\x4d\x18", b"PK\x03\x04", b"7z\xbc\xaf"),
        "unpack it first",
    ),
    _Foreign("a table", (".csv", ".tsv"), (), 'write its text column as .jsonl, a line {"text": …} for each row'),
    _Foreign(
        "a formatted document",
        (".pdf", ".doc", ".docx", ".odt", ".rtf", ".epub", ".html", ".htm", ".xlsx", ".pptx"),
        (b"%PDF-", b"{\\rtf"),
        "extract its text first",
    ),
    _Foreign("Parquet", (), (b"PAR1",), "rename it to .parquet"),
    _Foreign(
        "an Arrow file",
        (".arrow", ".feather"),
        (b"ARROW1",),
        "give the folder that `datasets` saved, or a .parquet file",
    ),
    _Foreign("UTF-16 text", (), (b"\xff\xfe", b"\xfe\xff"), "convert it: iconv -f UTF-16 -t UTF-8"),
)


@dataclass(frozen=True)
class Document:
    """A text, or an image.

    Attributes:
        name: for messages and reports.
        text: of an image, its codes in digits.
        label: the class given in its record; only classifiers and image generators use it.
        codes: of an image; empty: it is a text.
    """

    name: str
    text: str
    label: object = None
    codes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Reading:
    """How text is converted to rows of tokens: the recipe's `data.split`, `data.chat` and `data.pack`.

    Attributes:
        split: what separates the documents of a plain text file: "file" (the whole file is one document), "blank-line",
            or a regular expression (^ and $ match at each line); the matched text is dropped.
        chat: render each record's "messages" with the model's own chat template.
        pack: join documents by EOS and cut them as one text; "auto": only if they are short, see `corpus.token_rows`.
    """

    split: str = WHOLE_FILE
    chat: bool = False
    pack: bool | Literal["auto"] = "auto"


def read_documents(
    files: Iterable[Path | str], split: str = WHOLE_FILE, render: Render | None = None
) -> list[Document]:
    """Return the documents of `files`.

    A record is a document: a line of a .jsonl file, an item of a .json array, a row of a .parquet file or of a folder
    saved by `datasets`, a row of the arrays that `arrays.records` reads. Its text is its field "text", or its
    "messages" as rendered by `render`; an image has its field "codes" instead. Any other file is plain text.

    Args:
        files: to read, in this order.
        split: what separates the documents of a plain text file, see `Reading`.
        render: renders messages; None: each record needs a "text".

    Raises:
        InputError: a file is missing, empty, malformed or given twice; names every such file, and the line or record.
    """
    between = separator(split)
    given = [Path(file) for file in files]
    require_distinct(given)
    documents: list[Document] = []
    problems: list[str] = []
    whole: list[Path] = []  # plain texts of one document
    separated = False
    for file in given:
        try:
            if is_plain(file):
                found = [*_split(file, between)]
                separated = separated or len(found) > 1
                whole += [file] if len(found) == 1 else []
            else:
                found = [_document(file, where, record, render) for where, record in _records(file)]
            if not found:
                raise InputError(f"text file {str(file)!r} contains no documents")
        except InputError as error:
            problems.append(str(error))
        else:
            documents += found
    if between and whole and not separated and not problems:
        problems.append(f"split {split!r} separates nothing in {whole[0]}; correct it, or omit it")
    if problems:
        raise InputError("; ".join(problems))
    return documents


def content_of(file: Path) -> list[Path]:
    """Return the files to read: `file` itself, or those of a folder saved by `datasets`, or of images."""
    if not file.is_dir():
        return [file]
    return [file / arrow.STATE, *arrow.files_of(file)] if arrow.is_dataset(file) else files_of(file)


def is_plain(file: Path) -> bool:
    """Return whether `file` would be read as plain text, by its name."""
    return file.suffix.lower() not in (*_LINES, ".json", ".parquet", *arrays.SUFFIXES) and not file.is_dir()


# --- plain text -----------------------------------------------------------------------------------


def separator(split: str) -> re.Pattern[str] | None:
    """Return the pattern of a `split`, or None for whole files. Raises InputError."""
    if split == WHOLE_FILE:
        return None
    if split == BLANK_LINE:
        return re.compile(r"(?:\A|\n)(?:[^\S\n]*\n)+|\n[^\S\n]*\Z")
    try:
        pattern = re.compile(split, re.MULTILINE)
    except (re.error, RecursionError, OverflowError) as error:
        raise InputError(f'must be "{WHOLE_FILE}", "{BLANK_LINE}" or a regular expression ({error})') from None
    if pattern.search(""):
        raise InputError("must not match an empty string, or every character would be a document")
    return pattern


def _split(file: Path, between: re.Pattern[str] | None) -> Iterator[Document]:
    """Yield the documents of a plain text, named after the line on which they begin; blank ones are dropped."""
    text = _text(file)
    if _is_json(text):
        raise InputError(f"text file {str(file)!r} contains JSON; rename it to .jsonl (a record per line) or .json")
    if between is None:
        yield Document(file.name, text)
        return
    start, line = 0, 1
    for match in chain(between.finditer(text), [None]):
        piece = text[start : match.start() if match else None]
        if piece.strip():
            blank = piece[: len(piece) - len(piece.lstrip())].count("\n")
            yield Document(f"{file.name}:{line + blank}", piece)
        if match:
            line += text.count("\n", start, match.end())
            start = match.end()


def _is_json(text: str) -> bool:
    """Return whether a supposedly plain text consists of JSON records."""
    text = text.strip()
    candidates = {"{": (text.partition("\n")[0], text), "[": (text,)}
    for candidate in candidates.get(text[:1], ()):
        try:
            value = json.loads(candidate)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict) or (value and all(isinstance(item, dict) for item in value)):
            return True
    return False


def _text(file: Path) -> str:
    """Return a file's text without a byte order mark, its lines ended by \\n. Raises InputError."""
    shown = f"text file {str(file)!r}"
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{shown} does not exist") from None
    except OSError as error:
        raise InputError(f"{shown} cannot be read: {error.strerror}") from None
    for kind in _FOREIGN:
        if file.suffix.lower() in kind.suffixes or content.startswith(kind.magic):
            raise InputError(f"{shown} is {kind.what}, not text; {kind.remedy}")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{shown} cannot be read as UTF-8 text: {error}") from None
    if "\0" in text:
        raise InputError(f"{shown} contains NUL bytes, so it is not text; give plain text, .jsonl, .json or .parquet")
    if not text.strip():
        raise InputError(f"{shown} is empty")
    return text.replace("\r\n", "\n").replace("\r", "\n")


# --- records --------------------------------------------------------------------------------------


def _records(file: Path) -> Iterator[tuple[str, Any]]:
    """Yield each record of a file or folder, and its location."""
    if file.is_dir() or file.suffix.lower() == ".parquet":
        for number, row in enumerate(arrow.rows(file, _FIELDS), start=1):
            yield f"row {number}", row
        return
    if file.suffix.lower() in arrays.SUFFIXES:
        for number, row in enumerate(arrays.records(file), start=1):
            yield f"row {number}", row
        return
    text = _text(file)
    if file.suffix.lower() == ".json" and text.lstrip()[:1] == "[":
        for number, record in enumerate(_loaded(file, "the file", text), start=1):
            yield f"item {number}", record
        return
    # Some .json files have a record per line, too. Not splitlines(): JSON strings may contain U+2028 and such
    # unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"line {number}", _loaded(file, f"line {number}", line)


def _loaded(file: Path, where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        remedy = "; a .json file must be an array of records or a record per line" if file.suffix == ".json" else ""
        raise InputError(f"{file}: {where} is not JSON ({str(error)[:200]}){remedy}") from None


def _document(file: Path, where: str, record: Any, render: Render | None) -> Document:
    named = f"{file}: {where}"
    if not isinstance(record, dict):
        raise InputError(f'{named} must be an object with a string field "text"')
    value = record.get("text")
    codes: tuple[int, ...] = ()
    if value is None and record.get("messages") is None and record.get("codes") is not None:
        codes = _codes(named, record["codes"])
        value = " ".join(map(str, codes))
    elif render is not None and record.get("messages") is not None:
        value = _rendered(named, record, render)
    elif not isinstance(value, str):
        raise InputError(f'{named} must be an object with a string field "text"{_instead(record)}')
    name = record.get("name")
    if name is None:
        name = f"{file.name}:{where.split()[-1]}"
    if not isinstance(name, str):
        raise InputError(f'{named}: its field "name" must be a string')
    if not (_is_unicode(value) and _is_unicode(name)):
        raise InputError(f"{named} contains a lone surrogate, which is not valid text")
    return Document(name, value, record.get("label"), codes)


def _codes(named: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not value or not all(type(code) is int for code in value):
        raise InputError(f'{named}: its field "codes" must be a list of integers')
    return tuple(value)


def _instead(record: dict[str, Any]) -> str:
    """Describe what a record without text has instead."""
    if record.get("messages") is not None:
        return "; it has messages: --chat, or data.chat = true, renders them with the model's chat template"
    names = ", ".join(map(repr, [*record][:8]))
    return f"; its fields are {names[:200]}" if names else ""


def _rendered(named: str, record: dict[str, Any], render: Render) -> str:
    messages, tools = record["messages"], record.get("tools")
    if not isinstance(messages, list) or not messages:
        raise InputError(f'{named}: its field "messages" must be a list of messages')
    if not all(isinstance(message, dict) and isinstance(message.get("role"), str) for message in messages):
        raise InputError(f'{named}: each of its messages must be an object with a string field "role"')
    if tools is not None and not isinstance(tools, list):
        raise InputError(f'{named}: its field "tools" must be a list')
    try:
        return render(messages, tools)
    except InputError as error:
        raise InputError(f"{named}: {error}") from None


def _is_unicode(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
