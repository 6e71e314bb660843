import json
import math

import pytest
import torch

from numprune.corpus import Document, read_documents, rows_digest, sample_rows, token_rows
from numprune.errors import InputError
from tests.conftest import byte_tokenizer


def test_plain_file_is_one_document_and_json_lines_are_many(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    (tmp_path / "b.jsonl").write_text('{"text": "x\u2028y", "name": "first"}\n\n{"text": "z"}\n')
    documents = read_documents([tmp_path / "a.txt", tmp_path / "b.jsonl"])
    assert documents == [Document("a.txt", "one\n\ntwo"), Document("first", "x\u2028y"), Document("b.jsonl:3", "z")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b"\xff\xfe", "UTF-8"),
        ("a.jsonl", b'{"text": 1}', 'line 1 must be an object with a string field "text"'),
        ("a.jsonl", b'{"text": "a"}\n[1]', "line 2 must be"),
        ("a.jsonl", b"{", "line 1 is not JSON"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_documents([tmp_path / name])
    assert name in str(caught.value)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.txt' does not exist"):
        read_documents([tmp_path / "nowhere.txt"])


def test_windows_are_consecutive_and_never_cross_a_document():
    documents = [Document("a", "abcdefgh"), Document("b", "ijklm"), Document("c", "n")]
    rows = token_rows(documents, byte_tokenizer(), length=4)
    texts = [byte_tokenizer().decode(row) for row in rows.rows]
    # "m" and "n" alone score nothing
    assert texts == ["abcd", "efgh", "ijkl"]
    assert rows.document == [0, 0, 1]
    assert rows.tokens == 12


def test_digest_depends_on_tokens_boundaries_and_length():
    tokenizer = byte_tokenizer()
    base = token_rows([Document("a", "abcd"), Document("b", "efgh")], tokenizer, 4).digest
    assert base == token_rows([Document("x", "abcd"), Document("y", "efgh")], tokenizer, 4).digest
    assert base != token_rows([Document("a", "abcde"), Document("b", "fgh")], tokenizer, 4).digest
    assert base != token_rows([Document("a", "abcd"), Document("b", "efgh")], tokenizer, 3).digest


def test_sample_is_seeded_full_windows_without_replacement():
    rows = token_rows([Document("a", json.dumps(list(range(200))))], byte_tokenizer(), 16)
    first, again, other = (sample_rows(rows, 20, 16, seed) for seed in (1, 1, 2))
    assert first.shape == (20, 16)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len({tuple(row.tolist()) for row in first}) == 20
    assert rows_digest(first) == rows_digest(again) != rows_digest(other)


def test_too_little_text_says_how_much_there_is():
    rows = token_rows([Document("a", "x" * 50)], byte_tokenizer(), 16)
    with pytest.raises(InputError, match=r"gives 3 windows of 16 tokens, but 4 samples were asked for"):
        sample_rows(rows, 4, 16, 0)


@pytest.mark.parametrize(("documents", "length"), [([], 8), ([Document("a", "x")], 8), ([Document("a", "xyz")], 1)])
def test_nothing_to_score_is_an_error(documents, length):
    with pytest.raises(InputError):
        token_rows(documents, byte_tokenizer(), length)


def test_all_tokens_but_the_first_of_each_window_are_scored():
    rows = token_rows([Document("a", "x" * 1000)], byte_tokenizer(), 64)
    assert sum(len(row) - 1 for row in rows.rows) == 1000 - math.ceil(1000 / 64)
