import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from numprune.corpus import token_rows
from numprune.documents import read_documents
from numprune.errors import NumpruneError
from tests.conftest import byte_tokenizer
from tests.fuzz.strangers import documents, fuzz, named, written

RECORD = {"text": "words", "name": "a", "messages": [{"role": "user", "content": "words"}], "tools": [{}]}


def chat(messages: list[dict[str, Any]], tools: list[Any] | None) -> str:
    return f"{messages} {tools}"


@pytest.fixture(scope="module", params=[".jsonl", ".json"])
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return (tmp_path_factory.mktemp("text") / "text").with_suffix(request.param)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return byte_tokenizer()


@fuzz
@given(st.lists(documents(RECORD), max_size=3))
@example([written({"messages": [{"role": "half \ud800"}]})])
@example([b'{"text": "a", "b": ' + b"1" * 5000 + b"}"])
@example([b'{"text": ' + b"[" * 100_000])
@example([b'{"text": "half \\ud800 a pair"}'])
@example([b'{"text": "words", "name": "\\udfff"}'])
@example([b'{"text": "words", "name": [1]}'])
def test_lines_of_text_become_rows_or_are_refused(
    file: Path, tokenizer: PreTrainedTokenizerBase, lines: list[bytes]
) -> None:
    file.write_bytes(b"\n".join(lines))
    found = named(read_documents, [file], "file", chat)
    if isinstance(found, NumpruneError):
        assert str(file) in str(found)
        return
    for document in found:
        json.dumps(document.name, ensure_ascii=False).encode()  # as reports name it
    named(token_rows, found, tokenizer, 8)


@fuzz
@given(st.binary(max_size=200) | st.text().map(str.encode))
@example(written("\ud800"))
def test_any_other_file_is_one_document_or_refused(
    file: Path, tokenizer: PreTrainedTokenizerBase, content: bytes
) -> None:
    path = file.with_suffix(".txt")
    path.write_bytes(content)
    found = named(read_documents, [path])
    if not isinstance(found, NumpruneError):
        assert len(found) == 1
        named(token_rows, found, tokenizer, 8)
    pieces = named(read_documents, [path], r"[\s\d]")
    if not isinstance(pieces, NumpruneError):
        assert "".join(piece.text for piece in pieces) == "".join(re.split(r"[\s\d]", found[0].text))
