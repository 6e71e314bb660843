"""Reports of schema 1, found in published releases: causal language models only, with another name for the loss."""

from typing import Any, Final, Literal

from pydantic import Field

from numprune.serving.report.models.fields import Count, Finite, Model, Number, ReportedEstimate
from numprune.serving.report.models.generation import Generation
from numprune.serving.report.models.quality import MAXIMUM_DOCUMENTS, MAXIMUM_WORST, UNITS, QualitySide
from numprune.serving.report.models.report import SCHEMA, AnyReport, Report

SCHEMA_1: Final = "numprune/report/1"

# Policies and the verdicts of published releases still use these names.
_NAMED_NOW = {"quality.nll_delta_nats_per_token": "quality.loss_delta"}


def path_of(metric: str) -> str:
    """The path in a report of the metric that a policy calls `metric`."""
    return _NAMED_NOW.get(metric, metric)


class _DocumentDelta(Model):
    name: str
    tokens: Count
    nll_delta_nats_per_token: Finite


class _DocumentDeltas(Model):
    values: tuple[Finite, ...] = Field(min_length=1, max_length=MAXIMUM_DOCUMENTS)
    worst: tuple[_DocumentDelta, ...] = Field(default=(), max_length=MAXIMUM_WORST)


class _Quality(Model):
    tokens: Count
    documents: Count
    packed: bool = Field(default=False, strict=True)
    baseline: QualitySide
    candidate: QualitySide
    nll_delta_nats_per_token: ReportedEstimate
    perplexity_ratio: ReportedEstimate
    document_deltas: _DocumentDeltas | None = None
    kl_nats_per_token: Number = None
    top1_agreement: Number = None
    generation: Generation | None = None


class _Report(AnyReport):
    version: Literal["numprune/report/1"] = Field(default=SCHEMA_1, alias="schema")
    quality: _Quality | None = None


def upgraded(data: dict[str, Any]) -> Report:
    """Upgrade a report of schema 1, including its verdict.

    The verdict's digest is checked before anything is renamed. Raises ValidationError.
    """
    old = _Report.model_validate(data).to_json()
    verdict = old.pop("verdict")
    if quality := old["quality"]:
        delta = quality.pop("nll_delta_nats_per_token")
        quality |= {"task": "causal-lm", "loss_delta": {**delta, "unit": UNITS["causal-lm"]}}
        for worst in (quality["document_deltas"] or {}).get("worst", []):
            worst["loss_delta"] = worst.pop("nll_delta_nats_per_token")
    report = Report.model_validate({**old, "schema": SCHEMA})
    if verdict is None:
        return report
    judged = verdict["judged"] and report.digest
    return Report.model_validate({**report.to_json(), "verdict": {**verdict, "judged": judged}})
