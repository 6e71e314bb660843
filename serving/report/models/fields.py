"""Field types of the report: numbers, digests, names, and estimates with their uncertainty."""

import math
from collections.abc import Mapping
from itertools import pairwise
from numbers import Integral, Real
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, model_validator


def number(value: Any) -> int | float | None:
    """A finite number unchanged; NaN, infinities and impossibly large values as None; anything else is an error."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError("a number or null")
    if isinstance(value, Integral):
        return whole if abs(whole := int(value)) < 1 << 63 else None
    return float(value) if math.isfinite(value) else None


def _facts(value: Any) -> Any:
    """Plain JSON, with NaN and infinity replaced by null."""
    if isinstance(value, Mapping):
        return {key: _facts(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_facts(item) for item in value]
    return value if value is None or isinstance(value, str | bool) else number(value)


Number = Annotated[int | float | None, BeforeValidator(number)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(strict=True, ge=0)]
Facts = Annotated[dict[str, JsonValue], BeforeValidator(_facts)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
ModelName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]  # in a registry
Runtime = Annotated[str, Field(pattern=r"^[a-z0-9_-]{1,64}$")]  # a segment of a metric's path
Metric = Annotated[str, Field(pattern=r"^[a-z0-9_]{1,64}$")]
CORPUS_NAME = r"^[a-z0-9_-]{1,64}$"
Corpus = Annotated[str, Field(pattern=CORPUS_NAME)]  # of held-out text
Concurrency = Annotated[str, Field(pattern=r"^[1-9][0-9]{0,8}$")]  # requests in flight
Shape = Annotated[str, Field(pattern=r"^[1-9][0-9]{0,8}x[1-9][0-9]{0,8}$")]  # texts in a batch x tokens of each


class Model(BaseModel):
    """The base of all report models: frozen, without unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Sides(Model):
    """A metric that each model has on its own."""

    baseline: Number
    candidate: Number


class ReportedEstimate(Model):
    """A value with its uncertainty: one-sided 95 % bounds, the two-sided 95 % interval, and the sampling unit."""

    value: Number
    ci95_lower: Number
    ci95_upper: Number
    interval95: tuple[Number, Number]
    samples: Count
    sampling_unit: Literal["document", "window", "repeat", "item", "image"]

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        bounds = [self.interval95[0], self.ci95_lower, self.ci95_upper, self.interval95[1]]
        known = [bound for bound in bounds if bound is not None]
        slack = 1e-9 * max([abs(bound) for bound in known], default=0.0)
        if any(first > second + slack for first, second in pairwise(known)):
            raise ValueError(f"the bounds of an estimate must ascend, but are {bounds}")
        return self
