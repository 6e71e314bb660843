"""An encoder's rows: windows between the tokenizer's special tokens."""

import pytest

from numprune.corpus import sample_rows
from numprune.documents import Document
from numprune.errors import InputError
from numprune.tasks.embedding import Embedding
from numprune.tasks.reading import frame_of
from tests.conftest import byte_tokenizer, encoder_tokenizer

CLS, SEP = 256, 257


def test_the_frame_is_the_tokenizer_s_special_tokens():
    assert frame_of(encoder_tokenizer()).prefix == (CLS,)
    assert frame_of(encoder_tokenizer()).suffix == (SEP,)
    assert frame_of(byte_tokenizer()).prefix == frame_of(byte_tokenizer()).suffix == ()


def test_calibration_rows_have_one_length_between_special_tokens():
    task, tokenizer = Embedding(), encoder_tokenizer()
    text = "lorem ipsum dolor sit amet " * 20
    rows = task.calibration_rows([Document("a", text)], tokenizer, 32)
    drawn = sample_rows(rows, 8, 32, seed=0)
    assert (drawn[:, 0] == CLS).all()
    assert (drawn[:, -1] == SEP).all()
    plain = tokenizer.encode(text, add_special_tokens=False)
    assert [token for row in rows.rows for token in row[1:-1].tolist()] == plain
    # Short texts are joined by [SEP], as a decoder's by EOS.
    short = task.calibration_rows([Document(str(i), "lorem ipsum") for i in range(40)], tokenizer, 32)
    assert short.packed
    assert all(len(row) == 32 for row in short.rows[:-1])


@pytest.mark.parametrize("length", [1, 2])
def test_a_row_must_have_room_for_a_token(length):
    with pytest.raises(InputError, match="at least 3 tokens are needed"):
        Embedding().heldout_rows([Document("a", "abc")], encoder_tokenizer(), length)
