"""Rows of training, selection and judgement have nothing in common, or are refused."""

import random

import pytest
import torch

from numprune.corpus import token_rows
from numprune.documents import Document
from numprune.errors import InputError
from numprune.recovery import rows
from numprune.recovery.options import RecoveryOptions
from numprune.recovery.rows import RecoveryRows, draw_rows, require_others, require_unseen, window_digests
from tests.conftest import byte_tokenizer

OPTIONS = RecoveryOptions(tokens=64, batch_size=2, selection_rows=3)


def documents(first: int, last: int) -> list[Document]:
    return [Document(f"page {i}", "".join(f"{i} x {j} = {i * j}, " for j in range(8))) for i in range(first, last)]


def test_training_and_selection_are_disjoint_and_each_window_comes_once() -> None:
    rows = token_rows([*documents(0, 9), *documents(0, 9)], byte_tokenizer(), 16)  # every window twice
    found = draw_rows(rows, 16, OPTIONS)
    assert (found.training.shape, found.selection.shape) == ((4, 16), (3, 16))
    assert len(window_digests([*found.training, *found.selection])) == 7
    assert draw_rows(rows, 16, OPTIONS).digest == found.digest
    assert (
        draw_rows(rows, 16, RecoveryOptions(tokens=64, batch_size=2, selection_rows=3, seed=1)).digest != found.digest
    )


def test_rows_that_are_trained_on_and_chosen_by_are_refused() -> None:
    rows = torch.arange(32).view(4, 8)
    with pytest.raises(InputError, match="2 selection rows are training rows"):
        RecoveryRows(rows, rows[1:3])


def test_a_text_without_rows_to_train_on_is_refused() -> None:
    rows = token_rows([Document("a", "the same text. " * 100)], byte_tokenizer(), 15)
    with pytest.raises(InputError, match="1 different windows of 15 tokens, and 3 selection rows leave none"):
        draw_rows(rows, 15, OPTIONS)


def prose(seed: int, words: int = 400) -> str:
    """Letters drawn at random: no two texts share more than a few in a row."""
    return "".join(random.Random(seed).choices("abcdefgh ", k=6 * words))


@pytest.mark.parametrize("length", [16, 64, 256])
@pytest.mark.parametrize("offset", [0, 1, 31, 100])
def test_an_excerpt_of_the_training_text_is_refused_wherever_windows_cut_it(length: int, offset: int) -> None:
    tokenizer, text = byte_tokenizer(), prose(0)
    trained = token_rows([Document("a", text)], tokenizer, length)
    judged = token_rows([Document("b", prose(1))], tokenizer, length)
    require_unseen(trained, judged)
    excerpt = Document("leaked", text[offset : offset + 3 * length])
    for documents in ([excerpt], [Document("b", prose(1)), excerpt]):
        judged = token_rows(documents, tokenizer, length, pack=False)
        with pytest.raises(
            InputError, match=r"more than half of 3 of its \d+ windows is in the training .* \(leaked\)"
        ):
            require_unseen(trained, judged)


def test_a_header_that_documents_share_is_no_excerpt() -> None:
    tokenizer, licence = byte_tokenizer(), prose(2)
    trained, short, long = (
        token_rows([Document(name, licence[:shared] + prose(seed, 50))], tokenizer, 256)
        for name, shared, seed in (("a", 200, 3), ("short", 120, 4), ("long", 200, 5))
    )
    require_unseen(trained, short)
    with pytest.raises(InputError, match=r"more than half of 1 of its 2 windows is in the training text \(long\)"):
        require_unseen(trained, long)


def test_excerpts_are_found_across_the_parts_that_are_digested_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, text = byte_tokenizer(), prose(0)
    trained, judged = (token_rows([Document("a", part)], tokenizer, 64) for part in (text, text[1:]))
    windows = [row for row in judged.rows if len(row) == 64]
    expected = rows._shared_runs(trained.rows, windows, 32)
    assert expected == [1.0] * len(windows)
    monkeypatch.setattr(rows, "_CHUNK", 7)
    assert rows._shared_runs(trained.rows, windows, 32) == expected


def test_a_judged_document_that_is_trained_on_is_refused_wherever_windows_cut_it() -> None:
    require_others(documents(0, 3), documents(3, 5))
    with pytest.raises(InputError, match=r"1 of its documents is in the training text \(page 2\)"):
        require_others(documents(0, 3), documents(2, 5))


def test_blank_documents_are_in_neither_text() -> None:
    require_others([*documents(0, 3), Document("empty", "")], [*documents(3, 5), Document("blank", " \n")])
