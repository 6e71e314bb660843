"""Rows of training, selection and judgement have nothing in common, or are refused."""

import pytest
import torch

from numprune.corpus import token_rows
from numprune.documents import Document
from numprune.errors import InputError
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


def test_a_judged_window_that_is_trained_on_is_refused_by_its_document() -> None:
    tokenizer = byte_tokenizer()
    rows = draw_rows(token_rows(documents(0, 3), tokenizer, 16), 16, RecoveryOptions(tokens=10_000, selection_rows=3))
    require_unseen(rows, token_rows(documents(3, 6), tokenizer, 16))
    for seen in (rows.training, rows.selection):
        text = tokenizer.decode(seen[0])
        judged = token_rows([*documents(3, 6), Document("leaked", text)], tokenizer, 16, pack=False)
        with pytest.raises(InputError, match=r"1 of its \d+ windows are in the training text \(leaked\)"):
            require_unseen(rows, judged)


def test_a_judged_document_that_is_trained_on_is_refused_wherever_windows_cut_it() -> None:
    require_others(documents(0, 3), documents(3, 5))
    with pytest.raises(InputError, match=r"1 of its documents are in the training text \(page 2\)"):
        require_others(documents(0, 3), documents(2, 5))
