"""Names of each task's figures."""

from collections.abc import Iterator, Mapping

from numprune.counted import counted
from numprune.serving.report import words
from numprune.serving.report.models import Quality, Report, ReportedEstimate, Sides, TaskAccuracy

METRICS: Mapping[str, str] = {
    "nll_nats_per_masked_token": "NLL, nats/masked token",
    "kl_nats_per_masked_token": "KL from baseline, nats/masked token",
    "nll_nats_per_text": "NLL, nats/text",
    "kl_nats_per_text": "KL from baseline, nats/text",
    "nll_nats_per_image": "NLL, nats/image",
    "kl_nats_per_image": "KL from baseline, nats/image",
    "accuracy": "Accuracy",
    "top5_accuracy": "Top-5 accuracy",
    "right_to_wrong": "Right to wrong",
    "wrong_to_right": "Wrong to right",
    "top1_agreement": "Top-1 agreement",
    "similarity_spearman": "Spearman correlation of pairwise similarities",
}
_SHARES = {"accuracy", "top5_accuracy", "top1_agreement"}
_OF_LABELS = {"nll_nats_per_text", "nll_nats_per_image"}
_MAXIMUM_METRICS = _MAXIMUM_CORPORA = 50

# By the unit of the loss: what is predicted, and counted. Of other tasks these are the texts or images.
_COUNTED = {"nats/token": "token", "nats/code": "code", "nats/masked token": "masked token"}


def accuracies(tasks: Mapping[str, Mapping[str, TaskAccuracy]]) -> list[tuple[str, TaskAccuracy]]:
    """Each accuracy with its name, as "arc_easy, acc_norm"."""
    return [(f"{task}, {metric}", found) for task, of_task in tasks.items() for metric, found in of_task.items()]


def answered(tasks: Mapping[str, Mapping[str, TaskAccuracy]]) -> str:
    """Where both models answered, and after how many examples."""
    found = [one for _, one in accuracies(tasks)]
    runtimes = " and ".join(sorted({one.runtime for one in found}))
    least, most = (pick(one.num_fewshot for one in found) for pick in (min, max))
    examples = counted(most, "example") if least == most else f"{least} to {most} examples"
    return f"Answered by both models in {runtimes}, with {examples if most else 'no examples'} before each item."


def is_difference(found: Quality) -> bool:
    """Whether each model has this loss on its own, rather than a distance between the two."""
    return found.loss_delta.unit in _COUNTED or not _OF_LABELS.isdisjoint(found.metrics)


def loss(found: Quality) -> str:
    """The name of `loss_delta`, like `NLL difference`."""
    if found.task == "embedding":
        return "Distance from baseline"
    return "NLL difference" if is_difference(found) else "KL from baseline"  # of a classifier, without labels


def document(found: Quality) -> str:
    """What the loss is resampled over."""
    return "image" if found.loss_delta.unit in ("nats/image", "nats/code") else "document"


def material(found: Quality) -> str:
    """What quality was measured on, besides its extent."""
    return "images" if document(found) == "image" else "text"


def counted_as(found: Quality) -> str:
    """What the figures count in a document, as the title of a column."""
    return {"nats/image": "Images", "nats/code": "Codes"}.get(found.loss_delta.unit, "Tokens")


def too_few(found: Quality) -> str:
    """What to say of intervals over less than documents; empty where they are over documents."""
    if found.loss_delta.sampling_unit != "window":
        return ""
    these = "these images" if document(found) == "image" else "this text"
    return f": there are too few {document(found)}s to resample, so they hold for {these} only"


def metrics(found: Quality) -> Iterator[tuple[str, bool, Sides, ReportedEstimate | None]]:
    """For each metric: name, whether it is a share, values, and the change with its interval, if that is known.

    A metric of both models together has no baseline value.
    """
    for name, value in list(found.metrics.items())[:_MAXIMUM_METRICS]:
        sides = value if isinstance(value, Sides) else Sides(baseline=None, candidate=value)
        change = found.accuracy_delta if name == "accuracy" else None
        yield METRICS.get(name, name), name in _SHARES, sides, change


def corpora(found: Quality) -> Iterator[list[str]]:
    """A header, and for each other corpus its name, extent, and what the models lose there."""
    yield ["corpus", material(found), f"{loss(found)}, {found.loss_delta.unit}", "two-sided 95 %"]
    for name, other in list(found.corpora.items())[:_MAXIMUM_CORPORA]:
        delta = other.loss_delta
        yield [name, measured_on(other), words.signed(delta.value), words.interval(delta)]


def measured_on(found: Quality) -> str:
    """`5,000 tokens of 40 held-out documents`, `40 held-out texts (5,000 tokens)`, or `40 held-out images`."""
    if predicted := _COUNTED.get(found.loss_delta.unit):
        documents = counted(found.documents, f"held-out {document(found)}")
        return f"{counted(found.tokens, predicted)} of {documents}"
    if found.task == "image-classification":
        return counted(found.documents, "held-out image")
    return f"{counted(found.documents, 'held-out text')} ({counted(found.tokens, 'token')})"


def resampled(found: Quality) -> str:
    """What the interval of the loss is over: `40 documents`, `40 windows` or `40 images`."""
    delta = found.loss_delta
    return counted(delta.samples, "image" if document(found) == "image" else delta.sampling_unit)


def paired_by(found: Quality) -> str:
    """The unit by which the two models' losses are paired, like `token`."""
    return _COUNTED.get(found.loss_delta.unit, "image" if found.task == "image-classification" else "text")


def of_images(report: Report) -> bool:
    """Whether the model classifies images, so that a batch consists of them."""
    return report.quality is not None and report.quality.task == "image-classification"


def shape(key: str, *, images: bool) -> str:
    """`8x128` -> `8 x 128 tokens`, with a multiplication sign; of `images`, which have one length, `8 images`."""
    size, length = key.split("x")
    return counted(int(size), "image") if images else f"{size} \N{MULTIPLICATION SIGN} {length} tokens"
