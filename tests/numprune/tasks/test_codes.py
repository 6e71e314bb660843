"""Images as rows of codes."""

import re

import pytest
import torch

from numprune.codes import CodeVocabulary
from numprune.corpus import sample_rows
from numprune.documents import Document
from numprune.errors import InputError
from numprune.quality import compare, evaluate
from numprune.tasks import CAUSAL
from numprune.tasks.codes import ImageCodes
from tests.conftest import build_tiny, byte_tokenizer

CODES = CodeVocabulary(codes=259, classes=3)
TASK = ImageCodes(CODES, image=4, context=5)
PLAIN = ImageCodes(CodeVocabulary(codes=259, classes=0), image=4, context=4)
TOKENIZER = byte_tokenizer()


def image(*codes, label=None, name="images.jsonl:1"):
    return Document(name, " ".join(map(str, codes)), label, codes)


def test_a_row_is_the_start_of_an_image_and_its_codes():
    documents = [image(5, 6, 7, 4, label=2), image(8, 9, 10, 4), image(1, 2, 3, 4, label=0)]
    rows = TASK.heldout_rows(documents, TOKENIZER, 5)
    assert [row.tolist() for row in rows.rows] == [[261, 5, 6, 7, 4], [262, 8, 9, 10, 4], [259, 1, 2, 3, 4]]
    assert rows.document == [0, 1, 2]
    assert TASK.scored(rows).tolist() == [4, 4, 4]
    plain = PLAIN.heldout_rows(documents, TOKENIZER, 4)
    assert [row[0].item() for row in plain.rows] == [259, 259, 259]
    assert plain.digest != rows.digest


def test_one_calibration_row_in_ten_has_no_class():
    task = ImageCodes(CodeVocabulary(codes=259, classes=10), image=4, context=5)
    documents = [image(5, 6, 7, 8, label=index % 10, name=str(index)) for index in range(200)]
    starts = [row[0].item() for row in task.calibration_rows(documents, TOKENIZER, 5).rows]
    without = [index for index, start in enumerate(starts) if start == 269]
    assert len(without) == 20
    assert len({index % 10 for index in without}) > 5  # of no single class, though classes take turns
    assert all(start == 259 + index % 10 for index, start in enumerate(starts) if index not in without)
    rows = task.calibration_rows(documents, TOKENIZER, 5)
    assert starts == [row[0].item() for row in rows.rows]
    for seed in range(3):
        drawn = sample_rows(rows, 100, 5, seed)
        assert 4 <= int((drawn[:, 0] == 269).sum()) <= 16


def test_rows_always_begin_with_an_image(caplog):
    rows = TASK.heldout_rows([image(5, 6, 7, 8)], TOKENIZER, 3)
    assert [row.tolist() for row in rows.rows] == [[262, 5, 6]]
    assert "only the first 2 of 4 codes of each image are used" in caplog.text
    caplog.clear()
    TASK.heldout_rows([image(5, 6, 7, 8)], TOKENIZER, 5)
    PLAIN.heldout_rows([image(5, 6, 7, 8)], TOKENIZER, 4)  # it has no position for the last code
    assert not caplog.text
    TASK.heldout_rows([image(5, 6, 7, 8)], TOKENIZER, 4)
    assert "only the first 3 of 4 codes" in caplog.text


def test_losses_are_of_codes():
    dense, other = build_tiny("llamagen"), build_tiny("llamagen", seed=1)
    task = ImageCodes(CODES, image=9, context=10)
    documents = [image(*range(index, index + 9), label=index % 3, name=str(index)) for index in range(6)]
    rows = task.heldout_rows(documents, TOKENIZER, 10)
    found = evaluate(dense, rows, task)
    with torch.no_grad():
        logits = dense(torch.stack(rows.rows)).logits
    assert logits.shape[-1] == 259
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), torch.stack(rows.rows)[:, 1:].flatten())
    assert found.mean_nll == pytest.approx(float(expected), rel=1e-6)
    compared = compare(other, dense, rows, task)
    assert compared.loss_delta.sampling_unit == "document"
    assert compared.metrics["kl_nats_per_token"] > 0


@pytest.mark.parametrize(
    ("documents", "options", "message"),
    [
        (
            [Document("a.txt", "once upon a time")],
            {},
            "a.txt: is text, but the model generates images; give records with",
        ),
        ([image(5, 6, 7)], {}, "images.jsonl:1: has 3 codes, but the model's images have 4"),
        ([image(5, 259, 6, 7)], {}, "images.jsonl:1: code 259 is not one of the model's, which are 0 to 258"),
        ([image(5, -1, 6, 7)], {}, "code -1 is not one of the model's"),
        ([image(10**30, 5, 6, 7)], {}, "code 10000000000000000000 is not one of the model's"),
        ([image(5, 6, 7, 8, label=3)], {}, "images.jsonl:1: class 3 is not one of the model's classes (0 to 2)"),
        ([image(5, 6, 7, 8, label="cat")], {}, "label 'cat' must be the number of a class"),
        ([image(5)], {"pack": True}, "pack: images are not joined"),
        ([image(5)], {"length": 1}, "sequence length is 1"),
        ([], {}, "no images"),
    ],
)
def test_what_is_no_image_of_the_model_is_refused(documents, options, message):
    with pytest.raises(InputError, match=re.escape(message)):
        TASK.heldout_rows(documents, TOKENIZER, **{"length": 5, **options})


def test_a_language_model_reads_no_images():
    with pytest.raises(InputError, match="has codes of an image, but the model reads text"):
        CAUSAL.heldout_rows([image(5, 6)], TOKENIZER, 8)
