"""Quality on held-out text, by task."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Final, Literal, Self

from pydantic import Field, model_validator

from numprune.serving.report.models.fields import (
    Corpus,
    Count,
    Finite,
    Metric,
    Model,
    Number,
    ReportedEstimate,
    Sides,
)
from numprune.serving.report.models.generation import Generation
from numprune.serving.report.models.images import ClassLoss, Images

MAXIMUM_DOCUMENTS: Final = 200  # apart in a report
MAXIMUM_WORST: Final = 10
MAXIMUM_CHANGED: Final = 24  # images

Task = Literal["causal-lm", "masked-lm", "classification", "embedding", "image-classification"]
Unit = Literal["nats/token", "nats/masked token", "nats/text", "1 - cosine", "nats/image", "nats/code"]

# Unit of each task's loss; that of an image generator, a causal language model of codes, is nats/code.
UNITS: Mapping[Task, Unit] = MappingProxyType(
    {
        "causal-lm": "nats/token",
        "masked-lm": "nats/masked token",
        "classification": "nats/text",
        "embedding": "1 - cosine",
        "image-classification": "nats/image",
    }
)

# Fields of Quality for causal-lm only.
CAUSAL: Final = (
    "baseline",
    "candidate",
    "perplexity_ratio",
    "kl_nats_per_token",
    "top1_agreement",
    "generation",
    "images",
)


# Fields of Quality that only the first of several corpora has.
ONCE: Final = ("generation", "images", "corpus", "corpora")


class LossDelta(ReportedEstimate):
    """The candidate's loss minus the baseline's, or its distance from the baseline."""

    unit: Unit


class QualitySide(Model):
    nll_nats_per_token: Number
    perplexity: Number


class ChangedImage(Model):
    """An image that the models put into different classes; `png`: a small picture of it, in base64."""

    name: str
    label: str | None
    baseline: str
    candidate: str
    png: Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]+={0,2}$", max_length=65_536)]


class DocumentDelta(Model):
    name: str
    tokens: Count
    loss_delta: Finite


class DocumentDeltas(Model):
    """Differences by document, behind the mean difference.

    `values` are in ascending order: every document's difference or, for more than MAXIMUM_DOCUMENTS, that many equally
    spaced quantiles from minimum to maximum. `worst` are the documents that lost most, the worst first.
    """

    values: tuple[Finite, ...] = Field(min_length=1, max_length=MAXIMUM_DOCUMENTS)
    worst: tuple[DocumentDelta, ...] = Field(default=(), max_length=MAXIMUM_WORST)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        descending = [worst.loss_delta for worst in self.worst]
        if list(self.values) != sorted(self.values) or descending != sorted(descending, reverse=True):
            raise ValueError("differences by document must ascend, with the worst documents first in `worst`")
        return self


class BeforeRecovery(Model):
    """The pruned model before it was trained: its loss minus the baseline's and, for causal-lm, its own."""

    loss_delta: LossDelta
    nll_nats_per_token: Number = None
    perplexity: Number = None


class Quality(Model):
    """Quality on held-out text; differences are candidate - baseline, paired by the unit of the loss.

    `loss_delta` is against the dense base; `quantization_loss_delta`, for a quantized candidate, against the model
    before quantization; `recovery_loss_delta`, for one that was trained after pruning, is what training changed: the
    trained model against the `pruned` one, both in the precision of the base. `tokens`: scored ones (causal-lm,
    masked-lm), all tokens of the texts, or the images. `packed`: documents were joined by EOS and scored as one text;
    otherwise each was scored separately. `metrics`: those of tasks other than causal-lm, which has its own fields;
    `accuracy_delta`: of a classifier's labelled inputs, paired by input, see numprune.paired; `changed`: some of the
    images whose class changed, those that became wrong first; `classes`: of an
    image generator with classes.

    Where the held-out text is several named corpora, `corpus` is the first, which the figures are of, and `corpora` has
    those of the others.
    """

    task: Task
    tokens: Count
    documents: Count
    packed: bool = Field(default=False, strict=True)
    loss_delta: LossDelta
    quantization_loss_delta: LossDelta | None = None
    recovery_loss_delta: LossDelta | None = None
    pruned: BeforeRecovery | None = None
    document_deltas: DocumentDeltas | None = None
    baseline: QualitySide | None = None
    candidate: QualitySide | None = None
    perplexity_ratio: ReportedEstimate | None = None
    kl_nats_per_token: Number = None
    top1_agreement: Number = None
    generation: Generation | None = None
    images: Images | None = None
    classes: tuple[ClassLoss, ...] = ()
    metrics: dict[Metric, Sides | Number] = Field(default={})
    accuracy_delta: ReportedEstimate | None = None
    changed: tuple[ChangedImage, ...] = Field(default=(), max_length=MAXIMUM_CHANGED)
    corpus: Corpus | None = None
    corpora: "dict[Corpus, Quality]" = Field(default={})

    @model_validator(mode="after")
    def _named(self) -> Self:
        if self.corpora and self.corpus in (None, *self.corpora):
            raise ValueError("corpora need a first one, of another name than theirs: `corpus`")
        for name, found in self.corpora.items():
            if present := [field for field in ONCE if getattr(found, field)]:
                raise ValueError(f"corpora.{name}: only the first corpus has {', '.join(present)}")
        return self

    @model_validator(mode="after")
    def _of_the_task(self) -> Self:
        generator = self.task == "causal-lm" and self.loss_delta.unit == "nats/code"
        if not generator and self.loss_delta.unit != UNITS[self.task]:
            raise ValueError(f"the loss of {self.task} must be in {UNITS[self.task]}, not in {self.loss_delta.unit}")
        present = {name for name in CAUSAL if getattr(self, name) is not None}
        if self.task != "causal-lm" and present:
            raise ValueError(f"{', '.join(sorted(present))}: only causal-lm has these, but the task is {self.task}")
        if self.task == "causal-lm" and (self.metrics or not {"baseline", "candidate", "perplexity_ratio"} <= present):
            raise ValueError("causal-lm must have baseline, candidate and perplexity_ratio, and no metrics")
        return self

    @model_validator(mode="after")
    def _all_documents(self) -> Self:
        expected = min(self.documents, MAXIMUM_DOCUMENTS)  # zero is left for the gates to reject
        if expected and self.document_deltas is not None and len(self.document_deltas.values) != expected:
            raise ValueError(f"document_deltas.values must have {expected} values for {self.documents} documents")
        return self
