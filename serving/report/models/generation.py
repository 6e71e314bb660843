"""Outputs that both models generated from the same prompts."""

import math
from typing import Final, Self

from pydantic import Field, model_validator

from numprune.serving.report.models.fields import Count, Model, Number

MAXIMUM_PROMPTS: Final = 100


class Output(Model):
    """The greedy output of a model.

    `empty`: nothing but white space. `repeating`: its end repeats a sequence of up to 20 tokens three times or more,
    over at least 16 tokens.
    """

    text: str
    tokens: Count
    empty: bool = Field(strict=True)
    repeating: bool = Field(strict=True)

    @property
    def failed(self) -> bool:
        return self.empty or self.repeating


class SideBySide(Model):
    prompt: str
    baseline: Output
    candidate: Output


class OutputCounts(Model):
    """One side: numbers and shares of empty and repeating outputs."""

    empty: Count
    repeating: Count
    empty_share: Number
    repeating_share: Number


class Generation(Model):
    """Both models on the same prompts. Greedy generation is deterministic, so these counts have no interval.

    `degraded`: prompts on which the candidate's output is empty or repeating, and the baseline's is neither.
    """

    prompts: Count
    chat_template: bool = Field(strict=True)
    maximum_tokens: Count
    baseline: OutputCounts
    candidate: OutputCounts
    degraded: Count
    degraded_share: Number
    outputs: tuple[SideBySide, ...] = Field(min_length=1, max_length=MAXIMUM_PROMPTS)

    @model_validator(mode="after")
    def _counted(self) -> Self:
        pairs = self.outputs
        claimed: list[int | float | None] = [self.prompts, self.degraded, self.degraded_share]
        degraded = sum(pair.candidate.failed and not pair.baseline.failed for pair in pairs)
        expected = [len(pairs), degraded, degraded / len(pairs)]
        for side, outputs in (
            (self.baseline, [pair.baseline for pair in pairs]),
            (self.candidate, [pair.candidate for pair in pairs]),
        ):
            empty, repeating = (sum(getattr(output, name) for output in outputs) for name in ("empty", "repeating"))
            claimed += [side.empty, side.repeating, side.empty_share, side.repeating_share]
            expected += [empty, repeating, empty / len(pairs), repeating / len(pairs)]
        if any(one is None or not math.isclose(one, other) for one, other in zip(claimed, expected, strict=True)):
            raise ValueError(f"the generation counts do not match the outputs, which give {expected}")
        return self
