"""Units of the losses that models are judged by."""

from collections.abc import Mapping

from numprune.families.family import TaskName

LOSS_UNITS: Mapping[TaskName, str] = {
    "causal-lm": "nats/token",
    "masked-lm": "nats/masked token",
    "classification": "nats/text",
    "embedding": "1 - cosine",
    "image-classification": "nats/image",
}
OF_CODES = "nats/code"  # of causal language models that generate images
