"""FID, KID and the Inception Score of an image generator's samples, in words."""

from collections.abc import Iterator

from numprune.counted import counted
from numprune.serving.report import words
from numprune.serving.report.models import FeatureNetwork, ImageMetric, Images, ReportedEstimate, Sides

_NAMES = {"fid": "FID", "kid": "KID", "inception_score": "Inception Score"}


def measured_by(network: FeatureNetwork) -> str:
    """On how many images, and by which network."""
    return (
        f"{counted(network.samples, 'image')} from each model and {counted(network.real_images, 'real image')}, by the "
        f"{counted(network.features, 'feature')} of {network.file}. FID and Inception Score are extrapolated to "
        "infinitely many images; as published, they are of these images only, which makes FID too large and the score "
        "too small. Intervals are two-sided, 95 %."
    )


def rows(found: Images) -> Iterator[list[tuple[str, str]]]:
    """The name of each figure, both models' values, and the difference, each with its interval or nothing."""
    for field, name in _NAMES.items():
        metric: ImageMetric | None = getattr(found, field)
        if metric is None:
            continue
        change = words.signed(metric.delta.value), words.interval(metric.delta)
        yield [(name, ""), *map(_with_interval, (metric.baseline, metric.candidate)), change]
        if (published := metric.published) is not None:
            spread = metric.deviation or Sides(baseline=None, candidate=None)
            both = [
                words.number(value) + ("" if deviation is None else f" ± {words.number(deviation, 2)}")
                for value, deviation in (
                    (published.baseline, spread.baseline),
                    (published.candidate, spread.candidate),
                )
            ]
            yield [(f"{name} as published", ""), *((value, "") for value in both), ("", "")]


def _with_interval(found: ReportedEstimate) -> tuple[str, str]:
    return words.number(found.value), words.interval(found)
