"""Images as rows of codes."""

import re

import pytest
import torch

from numprune.codes import CodeVocabulary
from numprune.documents import Document
from numprune.errors import InputError
from numprune.quality import compare, evaluate
from numprune.tasks import CAUSAL
from numprune.tasks.codes import ImageCodes
from tests.conftest import build_tiny, byte_tokenizer

TASK = ImageCodes(CodeVocabulary(codes=259, classes=3))
PLAIN = ImageCodes(CodeVocabulary(codes=259, classes=0))
TOKENIZER = byte_tokenizer()


def image(*codes, label=None, name="images.jsonl:1"):
    return Document(name, " ".join(map(str, codes)), label, codes)


def test_a_row_is_the_start_of_an_image_and_its_codes():
    documents = [image(5, 6, 7, label=2), image(8, 9, 10), image(1, 2, 3, label=0)]
    rows = TASK.heldout_rows(documents, TOKENIZER, 4)
    assert [row.tolist() for row in rows.rows] == [[261, 5, 6, 7], [262, 8, 9, 10], [259, 1, 2, 3]]
    assert rows.document == [0, 1, 2]
    assert TASK.scored(rows).tolist() == [3, 3, 3]
    plain = PLAIN.heldout_rows(documents, TOKENIZER, 4)
    assert [row[0].item() for row in plain.rows] == [259, 259, 259]
    assert plain.digest != rows.digest


def test_one_calibration_row_in_ten_has_no_class():
    documents = [image(5, 6, label=index % 3, name=str(index)) for index in range(40)]
    starts = [row[0].item() for row in TASK.calibration_rows(documents, TOKENIZER, 3).rows]
    assert [index for index, start in enumerate(starts) if start == 262] == [0, 10, 20, 30]
    assert all(start == 259 + index % 3 for index, start in enumerate(starts) if index % 10)


def test_rows_always_begin_with_an_image(caplog):
    rows = TASK.heldout_rows([image(5, 6, 7, 8, 9)], TOKENIZER, 3)
    assert [row.tolist() for row in rows.rows] == [[262, 5, 6]]
    assert "only the first 2 of 5 codes of each image are used" in caplog.text
    caplog.clear()
    TASK.heldout_rows([image(5, 6, 7, 8, 9)], TOKENIZER, 6)
    assert not caplog.text
    TASK.heldout_rows([image(5, 6, 7, 8, 9)], TOKENIZER, 5)
    assert "only the first 4 of 5 codes" in caplog.text


def test_losses_are_of_codes():
    dense, other = build_tiny("llamagen"), build_tiny("llamagen", seed=1)
    documents = [image(*range(index, index + 8), label=index % 3, name=str(index)) for index in range(6)]
    rows = TASK.heldout_rows(documents, TOKENIZER, 9)
    found = evaluate(dense, rows, TASK)
    with torch.no_grad():
        logits = dense(torch.stack(rows.rows)).logits
    assert logits.shape[-1] == 259
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), torch.stack(rows.rows)[:, 1:].flatten())
    assert found.mean_nll == pytest.approx(float(expected), rel=1e-6)
    compared = compare(other, dense, rows, TASK)
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
        ([image(5, 259)], {}, "images.jsonl:1: code 259 is not one of the model's, which are 0 to 258"),
        ([image(5, -1)], {}, "code -1 is not one of the model's"),
        ([image(10**30)], {}, "code 10000000000000000000 is not one of the model's"),
        ([image(5, label=3)], {}, "images.jsonl:1: class 3 is not one of the model's classes (0 to 2)"),
        ([image(5, label="cat")], {}, "label 'cat' must be the number of a class"),
        ([image(5)], {"pack": True}, "pack: images are not joined"),
        ([image(5)], {"length": 1}, "sequence length is 1"),
        ([], {}, "no images"),
    ],
)
def test_what_is_no_image_of_the_model_is_refused(documents, options, message):
    with pytest.raises(InputError, match=re.escape(message)):
        TASK.heldout_rows(documents, TOKENIZER, **{"length": 8, **options})


def test_a_language_model_reads_no_images():
    with pytest.raises(InputError, match="has codes of an image, but the model reads text"):
        CAUSAL.heldout_rows([image(5, 6)], TOKENIZER, 8)
