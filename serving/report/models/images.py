"""Samples of an image generator beside those of the dense model."""

from typing import Annotated, Final

from pydantic import Field

from numprune.serving.report.models.fields import Count, Finite, Model, Number, ReportedEstimate, Sides

MAXIMUM_SAMPLES: Final = 60  # on a contact sheet
_MAXIMUM_BYTES: Final = 4 << 20


class ClassLoss(Model):
    """The NLL of a class's held-out images in both models, in nats per code."""

    label: Count
    images: Count
    baseline: Finite
    candidate: Finite


class ImageMetric(Model):
    """A figure of both models' samples, without bias, and candidate - baseline.

    `published`: as the literature reports it, with the bias of finitely many images; null where there is none.
    `deviation`: over ten parts of the samples, as the literature reports it for the Inception Score.
    """

    baseline: ReportedEstimate
    candidate: ReportedEstimate
    delta: ReportedEstimate
    published: Sides | None = None
    deviation: Sides | None = None


class FeatureNetwork(Model):
    """The network that samples and real images were compared with: a file with features of this length.

    `samples`: from each model; `real_images`: that they were compared with.
    """

    file: Annotated[str, Field(min_length=1, max_length=255)]
    features: Count
    samples: Count
    real_images: Count


class Images(Model):
    """Samples drawn from both models with the same classes and noise, without an interval.

    `guidance`: scale of classifier-free guidance. `guided_kl_nats_per_code`: KL divergence of guided distributions from
    the dense model's on held-out images; null without classes. `code_divergence_nats`: Jensen-Shannon divergence of the
    frequencies of codes in samples; `code_divergence_of_dense_nats`: of two sets of samples of the dense model.
    `sheet`: PNG in base64 with the dense model's images, and below each the candidate's; null if nothing turns codes
    into pictures.

    `fid`, `kid`, `inception_score`: see numprune.frechet, numprune.kernel_distance and numprune.inception_score, by the
    features of `network`; null where the recipe names none, or it has no classes.
    """

    samples: Count
    guidance: Number
    guided_kl_nats_per_code: Number = None
    code_divergence_nats: Number
    code_divergence_of_dense_nats: Number
    fid: ImageMetric | None = None
    kid: ImageMetric | None = None
    inception_score: ImageMetric | None = None
    network: FeatureNetwork | None = None
    sheet: Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]+={0,2}$", max_length=_MAXIMUM_BYTES)] | None = None
