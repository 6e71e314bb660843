import json
import math

import numpy as np
import pytest
import torch

from numprune.corpus import rows_digest, sample_rows, token_rows
from numprune.documents import Document
from numprune.errors import InputError
from tests.conftest import byte_tokenizer


def test_windows_are_consecutive_and_never_cross_a_document():
    documents = [Document("a", "abcdefgh"), Document("b", "ijklm"), Document("c", "n")]
    rows = token_rows(documents, byte_tokenizer(), length=4)
    texts = [byte_tokenizer().decode(row) for row in rows.rows]
    # "m" and "n" alone score nothing
    assert texts == ["abcd", "efgh", "ijkl"]
    assert rows.document == [0, 0, 1]
    assert (rows.tokens, rows.documents, rows.packed) == (9, 2, False)


def test_digest_depends_on_tokens_boundaries_and_length():
    tokenizer = byte_tokenizer()
    base = token_rows([Document("a", "abcd"), Document("b", "efgh")], tokenizer, 4).digest
    assert base == token_rows([Document("x", "abcd"), Document("y", "efgh")], tokenizer, 4).digest
    assert base != token_rows([Document("a", "abcde"), Document("b", "fgh")], tokenizer, 4).digest
    assert base != token_rows([Document("a", "abcd"), Document("b", "efgh")], tokenizer, 3).digest


def test_samples_are_seeded_full_windows_without_replacement():
    rows = token_rows([Document("a", json.dumps(list(range(200))))], byte_tokenizer(), 16)
    first, again, other = (sample_rows(rows, 20, 16, seed) for seed in (1, 1, 2))
    assert first.shape == (20, 16)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len({tuple(row.tolist()) for row in first}) == 20
    assert rows_digest(first) == rows_digest(again) != rows_digest(other)


def test_too_little_text_reports_the_amount():
    rows = token_rows([Document("a", "x" * 50)], byte_tokenizer(), 16)
    with pytest.raises(InputError, match=r"gives 3 windows of 16 tokens, but 4 samples were requested"):
        sample_rows(rows, 4, 16, 0)


@pytest.mark.parametrize(("documents", "length"), [([], 8), ([Document("a", "x")], 8), ([Document("a", "xyz")], 1)])
def test_text_without_scorable_tokens_is_an_error(documents, length):
    with pytest.raises(InputError):
        token_rows(documents, byte_tokenizer(), length)


def test_all_but_the_first_token_of_each_window_are_scored():
    rows = token_rows([Document("a", "x" * 1000)], byte_tokenizer(), 64)
    assert sum(len(row) - 1 for row in rows.rows) == 1000 - math.ceil(1000 / 64)


# --- packed ---------------------------------------------------------------------------------------

EOS = 257


def bytes_of(rows):
    return ["".join("|" if token == EOS else byte_tokenizer().decode(token) for token in row) for row in rows.rows]


def test_packed_documents_are_joined_by_eos_and_cut_as_one_text():
    documents = [Document("a", "abc"), Document("blank", " \n"), Document("b", "d"), Document("c", "efghi")]
    rows = token_rows(documents, byte_tokenizer(), 4, pack=True)
    assert bytes_of(rows) == ["abc|", "d|ef", "ghi"]
    assert rows.packed
    assert (rows.document, rows.spans) == ([0, 2, 3, 3], [[4], [2, 2], [3]])
    assert (rows.scored.tolist(), rows.row.tolist()) == ([3, 1, 2, 2], [0, 1, 1, 2])
    assert (rows.tokens, rows.documents) == (8, 3)  # of 11, the first of each row is not scored


def test_a_document_ending_with_eos_gets_no_second_one():
    rows = token_rows([Document("a", "ab</s>"), Document("b", "cd")], byte_tokenizer(), 8, pack=True)
    assert bytes_of(rows) == ["ab|cd"]


def test_token_values_are_summed_by_span():
    documents = [Document("a", "abc"), Document("b", "d"), Document("c", "efghi")]
    rows = token_rows(documents, byte_tokenizer(), 3, pack=True)  # abc, |d|, efg, hi
    sums = np.zeros(len(rows.document))
    rows.add(sums, [1, 2], np.array([[1.0, 10.0], [100.0, 1000.0]]))
    rows.add(sums, [0], np.array([[2.0, 3.0]]))
    assert rows.document == [0, 0, 1, 2, 2]
    # The EOS of "a" is the first token of its row: not scored, and "d" is.
    assert sums.tolist() == [5.0, 0.0, 11.0, 1100.0, 0.0]
    assert rows.scored.tolist() == [2, 0, 2, 2, 1]


def test_a_subset_of_rows_keeps_its_spans():
    documents = [Document("a", "abc"), Document("b", "d"), Document("c", "efghi")]
    for pack in (True, False):
        rows = token_rows(documents, byte_tokenizer(), 3, pack=pack)
        first, rest = rows.part(slice(1)), rows.part(slice(1, None))
        assert [*first.rows, *rest.rows] == rows.rows
        assert first.document + rest.document == rows.document
        assert [*first.scored, *rest.scored] == [*rows.scored]
        assert first.tokens + rest.tokens == rows.tokens
        assert len({first.digest, rest.digest, rows.digest}) == 3


def test_only_short_documents_are_packed_by_default():
    short = [Document(str(i), f"document {i}") for i in range(30)]
    long = [Document(str(i), f"document {i} " * 9) for i in range(30)]
    assert token_rows(short, byte_tokenizer(), 32).packed
    assert not token_rows(short, byte_tokenizer(), 32, pack=False).packed
    assert not token_rows(long, byte_tokenizer(), 32).packed
    assert not token_rows([Document("a", "one short document")], byte_tokenizer(), 32).packed
    half = [Document("a", "x" * 8), Document("b", "y" * 8), Document("c", "z" * 16)]
    assert not token_rows(half, byte_tokenizer(), 16).packed
    assert token_rows([*half, Document("d", "!")], byte_tokenizer(), 16).packed


def test_packed_rows_have_their_own_digest():
    documents = [Document("a", "abcd"), Document("b", "efgh")]
    packed = token_rows(documents, byte_tokenizer(), 4, pack=True).digest
    assert packed != token_rows(documents, byte_tokenizer(), 4, pack=False).digest
    assert packed == token_rows(documents, byte_tokenizer(), 4, pack=True).digest
    moved = [Document("a", "abcde"), Document("b", "fgh")]
    assert packed != token_rows(moved, byte_tokenizer(), 4, pack=True).digest


def test_the_digest_of_unpacked_rows_is_unchanged():
    rows = token_rows([Document("a", "abcd"), Document("b", "efgh")], byte_tokenizer(), 4)
    assert rows.digest == "0044fb058d77065e570067cb9b81b72ac6c40b47768f9995c4ccff6e4d305a31"


def test_without_eos_nothing_is_packed():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    documents = [Document(str(i), "short") for i in range(9)]
    assert not token_rows(documents, tokenizer, 32).packed
    with pytest.raises(InputError, match="pack: the tokenizer has no EOS token"):
        token_rows(documents, tokenizer, 32, pack=True)


def test_too_few_rows_of_unpacked_documents_suggest_packing():
    documents = [Document(str(i), "x" * 20) for i in range(9)]
    assert len(sample_rows(token_rows(documents, byte_tokenizer(), 32), 5, 32, 0)) == 5
    with pytest.raises(InputError, match=r"gives 0 windows of 32 tokens.*give more text, packed documents, fewer"):
        sample_rows(token_rows(documents, byte_tokenizer(), 32, pack=False), 5, 32, 0)


def test_only_blank_documents_are_refused_even_packed():
    with pytest.raises(InputError, match="no document of at least two tokens"):
        token_rows([Document("a", " "), Document("b", "")], byte_tokenizer(), 4, pack=True)
