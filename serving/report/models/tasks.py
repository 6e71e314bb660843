"""Accuracy on tasks of the lm-evaluation-harness, paired by item."""

import math
from typing import Annotated, Self

from pydantic import Field, model_validator

from numprune.serving.report.models.fields import Count, Model, Number, ReportedEstimate, Runtime

TaskId = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]  # a segment of a metric's path
AccuracyMetric = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,128}$")]  # of the harness, with a filter's name


class TaskAccuracy(Model):
    """One accuracy of one task; see numprune.paired.

    Attributes:
        runtime: in which both models answered.
        num_fewshot: examples before each item.
        right_to_wrong, wrong_to_right: items, from the baseline to the candidate.
        accuracy_delta: candidate - baseline, by item.
        mcnemar_p: of McNemar's exact test, two-sided.
    """

    runtime: Runtime
    num_fewshot: Count
    items: Count
    baseline: Number
    candidate: Number
    right_to_wrong: Count
    wrong_to_right: Count
    accuracy_delta: ReportedEstimate
    mcnemar_p: Number

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        gained, items = self.wrong_to_right - self.right_to_wrong, self.items
        if self.accuracy_delta.samples != items or self.right_to_wrong + self.wrong_to_right > items:
            raise ValueError(f"the change and its flips must be of the {items} items")
        sides = (self.baseline, self.candidate, self.accuracy_delta.value)
        if items and None not in sides:
            before, after, change = (float(side or 0) for side in sides)
            if any(not math.isclose(found, gained / items, abs_tol=1e-9) for found in (after - before, change)):
                raise ValueError(
                    "the change must be the candidate's accuracy minus the baseline's, and that of the flips"
                )
        return self
