"""Sequence classification, with labels and without."""

import pytest
import torch

from numprune.documents import Document
from numprune.errors import InputError
from numprune.quality import compare, evaluate
from numprune.tasks.classification import Classification
from numprune.tasks.language import draw_labels
from tests.conftest import build_tiny, encoder_tokenizer

TASK = Classification({"bad": 0, "good": 1})
TOKENIZER = encoder_tokenizer()
TEXTS = [f"text {i}: " + "lorem ipsum " * (i % 4 + 1) for i in range(12)]
LABELS = [0, "good", 1, "bad"] * 3


def rows_of(labels=None, length=32):
    named = labels or [None] * len(TEXTS)
    documents = [Document(str(i), text, label) for i, (text, label) in enumerate(zip(TEXTS, named, strict=True))]
    return TASK.heldout_rows(documents, TOKENIZER, length)


def tiny(seed=0):
    return build_tiny("bert", seed=seed, task="classification")


def log_probabilities(model, rows):
    with torch.no_grad():
        return torch.cat([model(input_ids=row[None]).logits.log_softmax(-1) for row in rows.rows])


def test_without_labels_the_loss_is_the_divergence_from_the_baseline():
    rows, candidate, baseline = rows_of(), tiny(1), tiny()
    assert evaluate(candidate, rows, TASK) is None
    ours, theirs = (log_probabilities(model, rows).double() for model in (candidate, baseline))
    kl = (theirs.exp() * (theirs - ours)).sum(-1).mean()
    found = compare(candidate, baseline, rows, TASK, batch_size=5)
    assert found.metrics["kl_nats_per_text"] == pytest.approx(float(kl), rel=1e-4)
    assert found.loss_delta.value == pytest.approx(float(kl), rel=1e-4)
    assert found.metrics["top1_agreement"] == (ours.argmax(-1) == theirs.argmax(-1)).double().mean()
    assert (found.candidate, found.unit, found.loss_delta.samples) == (None, "nats/text", 12)


def test_with_labels_the_loss_is_their_nll():
    rows, candidate, baseline = rows_of(LABELS, length=20), tiny(1), tiny()
    assert rows.labels == [0, 1, 1, 0] * 3
    assert len(rows.rows) == 12  # of a longer text no more than the model reads
    labels = torch.tensor(rows.labels)
    ours, theirs = (log_probabilities(model, rows) for model in (candidate, baseline))
    nll, dense_nll = (float(-found.gather(1, labels[:, None]).mean()) for found in (ours, theirs))
    alone, found = evaluate(candidate, rows, TASK), compare(candidate, baseline, rows, TASK)
    assert alone.mean_nll == pytest.approx(nll, rel=1e-5)
    assert alone.accuracy == found.accuracy.candidate == (ours.argmax(-1) == labels).double().mean()
    assert found.accuracy.baseline == (theirs.argmax(-1) == labels).double().mean()
    assert found.loss_delta.value == pytest.approx(nll - dense_nll, abs=1e-5)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["good"] * 11 + [None], "11: has no label, but others do"),
        (["good"] * 11 + ["fair"], "11: label 'fair' is not a class of the model; its classes are bad, good"),
        ([0] * 11 + [2], "label '2' is not a class"),
        ([0] * 11 + [True], "label 'True' is not a class"),
        ([0] * 11 + [0.5], "label '0.5' is not a class"),
    ],
)
def test_unknown_labels_are_refused(labels, message):
    with pytest.raises(InputError, match=message):
        rows_of(labels)


def test_texts_are_not_joined():
    with pytest.raises(InputError, match="texts cannot be joined"):
        TASK.heldout_rows([Document("a", "a"), Document("b", "b")], TOKENIZER, 8, pack=True)


def test_calibration_labels_are_sampled_from_the_model():
    chances = torch.tensor([0.1, 0.6, 0.3])
    drawn = draw_labels(chances.log().expand(20_000, 3), torch.Generator().manual_seed(0))
    shares = torch.bincount(drawn, minlength=3) / 20_000
    torch.testing.assert_close(shares, chances, atol=0.012, rtol=0)  # about four standard errors
