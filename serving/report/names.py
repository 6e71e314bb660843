"""What the figures of a task are called."""

from collections.abc import Iterator, Mapping

from numprune.serving.report.models import Quality, Sides

METRICS: Mapping[str, str] = {
    "nll_nats_per_masked_token": "NLL, nats/masked token",
    "kl_nats_per_masked_token": "KL from baseline, nats/masked token",
    "nll_nats_per_text": "NLL, nats/text",
    "kl_nats_per_text": "KL from baseline, nats/text",
    "accuracy": "Accuracy",
    "top1_agreement": "Top-1 agreement",
    "similarity_spearman": "Spearman correlation of pairwise similarities",
}
_SHARES = {"accuracy", "top1_agreement"}
_MAXIMUM_METRICS = 50

_COUNTED = {"causal-lm": "token", "masked-lm": "masked token"}  # what the loss of other tasks is counted in: texts


def is_difference(found: Quality) -> bool:
    """Whether the loss is one that each model has by itself, and not a distance between them."""
    return found.task in _COUNTED or "nll_nats_per_text" in found.metrics


def loss(found: Quality) -> str:
    """`NLL difference`: what `loss_delta` is."""
    if found.task == "embedding":
        return "Distance from baseline"
    return "NLL difference" if is_difference(found) else "KL from baseline"  # a classifier's, without labels


def metrics(found: Quality) -> Iterator[tuple[str, bool, Sides]]:
    """The name of each of `metrics`, whether it is a share, and its values; one that is of both has no baseline's."""
    for name, value in list(found.metrics.items())[:_MAXIMUM_METRICS]:
        sides = value if isinstance(value, Sides) else Sides(baseline=None, candidate=value)
        yield METRICS.get(name, name), name in _SHARES, sides


def measured_on(found: Quality) -> str:
    """`5,000 tokens of 40 held-out documents`, or `40 held-out texts (5,000 tokens)`."""
    if found.task in _COUNTED:
        return f"{_count(found.tokens, _COUNTED[found.task])} of {_count(found.documents, 'held-out document')}"
    return f"{_count(found.documents, 'held-out text')} ({_count(found.tokens, 'token')})"


def paired_by(found: Quality) -> str:
    """`token`: what the two models' losses are paired by."""
    return _COUNTED.get(found.task, "text")


def shape(key: str) -> str:
    """`8x128` -> `8 x 128 tokens`, with a multiplication sign."""
    size, length = key.split("x")
    return f"{size} \N{MULTIPLICATION SIGN} {length} tokens"


def _count(amount: int, noun: str) -> str:
    return f"{amount:,} {noun}{'' if amount == 1 else 's'}"
