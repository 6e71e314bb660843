"""Rows for training, selection and evaluation are disjoint, or refused."""

import random

import pytest
import torch

from numprune.corpus import token_rows
from numprune.documents import Document
from numprune.errors import InputError
from numprune.recovery.options import RecoveryOptions
from numprune.recovery.rows import RecoveryRows, draw_rows, require_others, shared_runs, window_digests
from numprune.tasks.reading import frame_of
from tests.conftest import byte_tokenizer, encoder_tokenizer

OPTIONS = RecoveryOptions(tokens=64, batch_size=2, selection_rows=3)


def documents(first: int, last: int) -> list[Document]:
    return [Document(f"page {i}", "".join(f"{i} x {j} = {i * j}, " for j in range(8))) for i in range(first, last)]


def test_training_and_selection_are_disjoint_and_each_window_comes_once() -> None:
    rows = token_rows([*documents(0, 9), *documents(0, 9)], byte_tokenizer(), 16)  # every window twice
    found = draw_rows([rows], 16, OPTIONS)
    assert (found.training.shape, found.selection.shape) == ((4, 16), (3, 16))
    assert len(window_digests([*found.training, *found.selection])) == 7
    assert draw_rows([rows], 16, OPTIONS).digest == found.digest
    assert (
        draw_rows([rows], 16, RecoveryOptions(tokens=64, batch_size=2, selection_rows=3, seed=1)).digest != found.digest
    )


def test_rows_that_are_trained_on_and_chosen_by_are_refused() -> None:
    rows = torch.arange(32).view(4, 8)
    with pytest.raises(InputError, match="2 selection rows are training rows"):
        RecoveryRows(rows, rows[1:3])


def test_a_text_without_rows_to_train_on_is_refused() -> None:
    rows = token_rows([Document("a", "the same text. " * 100)], byte_tokenizer(), 15)
    with pytest.raises(InputError, match="1 different window of 15 tokens, and 3 selection rows leave none"):
        draw_rows([rows], 15, OPTIONS)


def prose(seed: int, words: int = 400) -> str:
    """Letters drawn at random: no two texts share more than a few in a row."""
    return "".join(random.Random(seed).choices("abcdefgh ", k=6 * words))


@pytest.mark.parametrize("length", [16, 64, 256])
@pytest.mark.parametrize("offset", [0, 1, 31, 100])
def test_windows_of_the_judged_text_are_not_drawn_at_any_offset(
    length: int, offset: int, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer, text = byte_tokenizer(), prose(0)
    trained, other = (token_rows([Document("a", part)], tokenizer, length) for part in (text, prose(1)))
    options = RecoveryOptions(tokens=10_000, selection_rows=2)
    everything = draw_rows([trained], length, options)
    assert draw_rows([trained], length, options, [other]).digest == everything.digest
    assert not caplog.messages
    excerpt = token_rows(
        [Document("b", prose(1)), Document("c", text[offset : offset + 3 * length])], tokenizer, length
    )
    left = window_digests([*(found := draw_rows([trained], length, options, [excerpt])).training, *found.selection])
    inside = range(-(-offset // length), (offset + 3 * length) // length)  # windows that are whole in the excerpt
    assert not window_digests(trained.rows[index] for index in inside) & left
    assert len(left) in (len(everything.training) + 2 - len(inside) - more for more in (0, 1))  # or most of another
    assert f"left out {len(everything.training) + 2 - len(left)} windows of the training text" in caplog.text
    assert "(a)" in caplog.text


@pytest.mark.parametrize("length", [16, 48, 64, 96])
@pytest.mark.parametrize("offset", [0, 1, 31])
def test_special_tokens_around_rows_hide_no_copy(length: int, offset: int) -> None:
    tokenizer, text = encoder_tokenizer(), prose(0)
    frame = frame_of(tokenizer)
    trained, judged, other = (
        token_rows([Document("a", part)], tokenizer, length, False, frame) for part in (text, text[offset:], prose(1))
    )
    everything = draw_rows([trained], length, OPTIONS)
    assert draw_rows([trained], length, OPTIONS, [other], frame=frame).digest == everything.digest
    with pytest.raises(InputError, match=rf"\d different windows? of {length} tokens that the held-out text does not"):
        draw_rows([trained], length, OPTIONS, [judged], frame=frame)


def test_a_judged_text_that_is_all_of_the_training_text_leaves_nothing() -> None:
    trained = token_rows([Document("a", prose(0))], byte_tokenizer(), 64)
    judged = token_rows([Document("b", prose(0)[1:])], byte_tokenizer(), 64)
    with pytest.raises(InputError, match=r"\d different windows? of 64 tokens that the held-out text does not have"):
        draw_rows([trained], 64, OPTIONS, [judged])


def test_a_header_that_documents_share_is_no_excerpt() -> None:
    tokenizer, licence = byte_tokenizer(), prose(2)
    judged, short, long = (
        token_rows([Document("a", licence[:shared] + prose(seed, 50))], tokenizer, 256).rows
        for shared, seed in ((200, 3), (120, 4), (200, 5))
    )
    assert 0 < shared_runs(short, judged, 32)[0] < 0.5 < shared_runs(long, judged, 32)[0]


def test_runs_are_found_across_the_parts_that_are_digested_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    text = prose(0)
    one, other = (token_rows([Document("a", part)], byte_tokenizer(), 64).rows for part in (text, text[1:]))
    expected = shared_runs(other, one, 32)
    assert expected == [1.0 if len(row) == 64 else 0.0 for row in other]
    monkeypatch.setattr("numprune.recovery.rows._CHUNK", 7)
    assert shared_runs(other, one, 32) == expected


def test_a_judged_document_that_is_trained_on_is_refused_wherever_windows_cut_it() -> None:
    require_others(documents(0, 3), documents(3, 5))
    with pytest.raises(InputError, match=r"1 of its documents is in the training text \(page 2\)"):
        require_others(documents(0, 3), documents(2, 5))


def test_blank_documents_are_in_neither_text() -> None:
    require_others([*documents(0, 3), Document("empty", "")], [*documents(3, 5), Document("blank", " \n")])
