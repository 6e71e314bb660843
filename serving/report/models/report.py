"""The whole report.json."""

import hashlib
import json
from typing import Annotated, Any, Final, Literal, Self

from pydantic import AwareDatetime, ConfigDict, Field, model_validator

from numprune.serving.report.models.fields import Facts, Model, Runtime
from numprune.serving.report.models.quality import Quality
from numprune.serving.report.models.run import Environment, Identity, Learning, Pruning, Quantization, Recovery, Sizes
from numprune.serving.report.models.speed import RuntimeMemory, RuntimeSpeed
from numprune.serving.report.models.tasks import AccuracyMetric, TaskAccuracy, TaskId
from numprune.serving.report.models.verdict import Verdict

SCHEMA: Final = "numprune/report/2"


class AnyReport(Model):
    """The part common to all report schemas: everything but the version and the section `quality`.

    Sections that a run did not measure are absent, and every gate on them fails. `price_per_hour`: of the serving
    machine, in the user's currency. `candidates`: how many this one is chosen among; gates take account of it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_by_name=True, validate_by_alias=True)

    version: str = Field(alias="schema")
    created: AwareDatetime
    run_id: str
    identity: Identity
    environment: Environment
    pruning: Pruning | None = None
    learning: Learning | None = None
    recovery: Recovery | None = None
    quantization: Quantization | None = None
    sizes: Sizes | None = None
    price_per_hour: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    candidates: Annotated[int, Field(strict=True, ge=1, lt=2**31)] = 1
    quality: Any = None
    tasks: dict[TaskId, dict[AccuracyMetric, TaskAccuracy]] = Field(default={})
    speed: dict[Runtime, RuntimeSpeed] = Field(default={})
    memory: dict[Runtime, RuntimeMemory] = Field(default={})
    parity: dict[Runtime, Facts] = Field(default={})
    verdict: Verdict | None = None

    @model_validator(mode="after")
    def _environment_decides(self) -> Self:
        claimed_valid = self.verdict is None or self.verdict.outcome != "invalid environment"
        if self.verdict is not None and claimed_valid != self.environment.valid:
            raise ValueError(f"verdict {self.verdict.outcome!r} contradicts environment.valid")
        return self

    @model_validator(mode="after")
    def _as_judged(self) -> Self:
        if self.verdict is not None and self.verdict.judged not in (None, self.digest):
            raise ValueError("the report was altered after its verdict; measure and judge again")
        return self

    @property
    def digest(self) -> str:
        """SHA-256 of everything but the verdict; default values are excluded, so that fields can be added."""
        facts = self.model_dump(mode="json", exclude={"verdict"}, exclude_defaults=True)
        return hashlib.sha256(json.dumps(facts, sort_keys=True, allow_nan=False).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, with the file's field names."""
        return self.model_dump(mode="json", by_alias=True)


class Report(AnyReport):
    """report.json."""

    version: Literal["numprune/report/2"] = Field(default=SCHEMA, alias="schema")
    quality: Quality | None = None

    def judged(self, verdict: Verdict) -> "Report":
        """This report with its verdict, validated again."""
        return Report.model_validate({**self.to_json(), "verdict": verdict.model_dump(mode="json")})
