"""Image classification, with labels and without."""

import pytest
import torch

from numprune.errors import InputError
from numprune.images import Processor
from numprune.pictures import read_pictures
from numprune.quality import compare, evaluate
from numprune.tasks.image_classification import ImageClassification
from tests.conftest import build_tiny, image_processor, write_images

NAMES = ["a", "b", "c", "d", "e", "f", "g"]
TASK = ImageClassification(
    {name: index for index, name in enumerate(NAMES)}, Processor("{}", (1, 8, 8), image_processor())
)


def tiny(seed=0):
    return build_tiny("vit", seed=seed, num_labels=len(NAMES))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return read_pictures([write_images(tmp_path_factory.mktemp("images") / "labelled", 28, NAMES)])


def log_probabilities(model, rows):
    with torch.no_grad():
        return model(pixel_values=torch.stack(rows.rows)).logits.double().log_softmax(-1)


def test_with_labels_the_loss_is_their_nll_and_accuracies_are_paired(pictures):
    rows, candidate, baseline = TASK.rows(pictures, judged=True), tiny(1), tiny()
    labels = torch.tensor(rows.labels)
    assert labels.tolist() == [index for index in range(7) for _ in range(4)]
    ours, theirs = (log_probabilities(model, rows) for model in (candidate, baseline))
    alone, found = evaluate(candidate, rows, TASK), compare(candidate, baseline, rows, TASK, batch_size=5)
    nll = [-one.gather(1, labels[:, None])[:, 0] for one in (ours, theirs)]
    assert alone.mean_nll == pytest.approx(float(nll[0].mean()), rel=1e-4)
    assert found.loss_delta.value == pytest.approx(float((nll[0] - nll[1]).mean()), abs=1e-4)
    assert (found.unit, found.loss_delta.samples, found.documents) == ("nats/image", 28, 28)
    right = [one.argmax(-1) == labels for one in (theirs, ours)]
    assert [found.accuracy.baseline, found.accuracy.candidate] == [float(one.double().mean()) for one in right]
    assert found.accuracy.right_to_wrong == int((right[0] & ~right[1]).sum())
    assert found.accuracy.accuracy_delta.samples == 28
    five = (ours.topk(5).indices == labels[:, None]).any(-1).double().mean()
    assert alone.top5_accuracy == found.candidate.top5_accuracy == float(five)


def test_without_labels_the_loss_is_the_divergence_from_the_baseline(pictures):
    rows, candidate, baseline = TASK.rows(pictures), tiny(1), tiny()
    assert evaluate(candidate, rows, TASK) is None
    ours, theirs = (log_probabilities(model, rows) for model in (candidate, baseline))
    found = compare(candidate, baseline, rows, TASK)
    kl = float((theirs.exp() * (theirs - ours)).sum(-1).mean())
    assert found.metrics["kl_nats_per_image"] == pytest.approx(kl, rel=1e-4)
    assert found.loss_delta.value == pytest.approx(kl, rel=1e-4)
    assert (found.candidate, found.accuracy) == (None, None)


def test_labels_that_are_no_classes_are_refused(tmp_path):
    other = read_pictures([write_images(tmp_path / "other", 2, ["a", "zebra"])])
    with pytest.raises(
        InputError, match=r"zebra/001.png: label 'zebra' is not a class of the model; its classes are a, b"
    ):
        TASK.rows(other, judged=True)
    some = read_pictures([write_images(tmp_path / "some", 1, ["a"]), write_images(tmp_path / "none", 1)])
    with pytest.raises(InputError, match=r"000.png: has no label, but others do; label all of them or none"):
        TASK.rows(some, judged=True)


def test_images_of_another_shape_are_refused(pictures):
    model = build_tiny("vit", num_labels=7, image_size=4)
    with pytest.raises(InputError, match=r"images have shape \[1, 8, 8\], but the model reads \[1, 4, 4\]"):
        evaluate(model, TASK.rows(pictures, judged=True), TASK)
