"""The schema of report.json.

Units stand in the names. A *metric* of a policy is a dotted path into this JSON that ends at a number or an estimate. A
number that was measured as NaN or infinite is kept as null, so that every gate on it fails; a number that is missing is
null too. Unknown fields are refused everywhere but in the bags of facts (a load's parameters, a runtime's description,
the result of a parity check), whose content belongs to whoever writes it.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from itertools import pairwise
from numbers import Integral, Real
from typing import Annotated, Any, Final, Literal, Self

from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, model_validator

SCHEMA: Final = "numprune/report/1"

Outcome = Literal["pass", "fail", "inconclusive", "invalid environment"]


def _number(value: Any) -> int | float | None:
    """A finite number as it is; NaN, infinities and what no measurement reaches as None; others are not numbers."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError("a number or null")
    if isinstance(value, Integral):
        return whole if abs(whole := int(value)) < 1 << 63 else None
    return float(value) if math.isfinite(value) else None


def _facts(value: Any) -> Any:
    """Plain JSON, with every NaN and infinity in it as null."""
    if isinstance(value, Mapping):
        return {key: _facts(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_facts(item) for item in value]
    return value if value is None or isinstance(value, str | bool) else _number(value)


MAXIMUM_DOCUMENTS: Final = 200  # apart in a report
MAXIMUM_WORST: Final = 10
MAXIMUM_PROMPTS: Final = 100

Number = Annotated[int | float | None, BeforeValidator(_number)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(strict=True, ge=0)]
Facts = Annotated[dict[str, JsonValue], BeforeValidator(_facts)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Runtime = Annotated[str, Field(pattern=r"^[a-z0-9_-]{1,64}$")]  # a segment of a metric's path
Metric = Annotated[str, Field(pattern=r"^[a-z0-9_]{1,64}$")]
Concurrency = Annotated[str, Field(pattern=r"^[1-9][0-9]{0,8}$")]  # requests in flight


class Model(BaseModel):
    """What every part of a report has in common: frozen, and nothing that the schema does not name."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Estimate(Model):
    """A value with its uncertainty: one-sided 95 % bounds, the two-sided 95 % interval, and what was resampled."""

    value: Number
    ci95_lower: Number
    ci95_upper: Number
    interval95: tuple[Number, Number]
    samples: Count
    sampling_unit: Literal["document", "window", "repeat"]

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        bounds = [self.interval95[0], self.ci95_lower, self.ci95_upper, self.interval95[1]]
        known = [bound for bound in bounds if bound is not None]
        slack = 1e-9 * max([abs(bound) for bound in known], default=0.0)
        if any(first > second + slack for first, second in pairwise(known)):
            raise ValueError(f"the bounds of an estimate ascend; these do not: {bounds}")
        return self


# --- identity, environment, what was done ---------------------------------------------------------


class Identity(Model):
    """SHA-256 digests of what went in and what came out; None for what this run did not have."""

    base: Sha256
    candidate: Sha256
    recipe: Sha256 | None = None
    calibration_rows: Sha256 | None = None
    heldout_rows: Sha256 | None = None
    plan: Sha256 | None = None
    exports: dict[Runtime, Sha256] = {}
    packages: dict[str, str] = {}


class Gpu(Model):
    """One GPU as nvidia-smi shows it; None where it shows nothing."""

    name: str
    uuid: str
    driver: str
    memory_bytes: Number = None
    sm_clock_mhz: Number = None
    max_sm_clock_mhz: Number = None
    power_limit_watts: Number = None
    temperature_celsius: Number = None
    throttle: tuple[str, ...] = ()  # why its clocks are lowered at this moment
    processes: tuple[int, ...] = ()  # other processes that compute on it


class Environment(Model):
    """The machine. `valid` is false when a reason says why its measurements mean nothing."""

    cpu: str
    cores: Count
    memory_bytes: Count
    platform: str
    gpu: Gpu | None = None
    load_average: tuple[Number, Number, Number] | None = None  # over 1, 5 and 15 minutes
    valid: bool = Field(strict=True)
    reasons: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _explained(self) -> Self:
        if self.valid == bool(self.reasons):
            raise ValueError("an environment is valid exactly when there is no reason against it")
        return self


class RatioRemoved(Model):
    """Shares removed, in [0, 1]."""

    prunable: Number = None
    parameters: Number = None
    kv_bytes: Number = None


class Pruning(Model):
    criterion: str
    allocation: str
    compensation: str
    ratio_asked: Number
    ratio_removed: RatioRemoved
    kept_units: dict[str, tuple[Count, Count]] = {}  # block -> (kept, of)


# --- what was measured ----------------------------------------------------------------------------


class SizePair(Model):
    """`ratio` is candidate / baseline; left out, it is computed; given, it must be that."""

    baseline: Number
    candidate: Number
    ratio: Number = None

    @model_validator(mode="before")
    @classmethod
    def _with_ratio(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or data.get("ratio") is not None:
            return data
        return {**data, "ratio": _quotient(_number(data.get("candidate")), _number(data.get("baseline")))}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        expected = _quotient(self.candidate, self.baseline)
        if self.ratio is not None and (expected is None or not math.isclose(self.ratio, expected, rel_tol=1e-6)):
            raise ValueError(f"ratio {self.ratio} is not candidate / baseline")
        return self


def _quotient(numerator: int | float | None, denominator: int | float | None) -> float | None:
    return None if numerator is None or not denominator else numerator / denominator


class Dtypes(Model):
    """Names of data types, as torch has them: "float32", "bfloat16"."""

    baseline: str
    candidate: str


class Sizes(Model):
    """`dtype`: of the stored weights."""

    dtype: Dtypes | None = None
    parameters: SizePair | None = None
    weight_bytes: SizePair | None = None
    kv_bytes_per_token: SizePair | None = None
    flops_per_token: SizePair | None = None


class QualitySide(Model):
    nll_nats_per_token: Number
    perplexity: Number


class DocumentDelta(Model):
    name: str
    tokens: Count
    nll_delta_nats_per_token: Finite


class DocumentDeltas(Model):
    """Documents apart: how the mean difference comes about.

    `values` ascend. They are every document's difference or, of more than MAXIMUM_DOCUMENTS, so many of their quantiles
    at equal steps, from the least to the largest. `worst` are those that lost most, the worst first.
    """

    values: tuple[Finite, ...] = Field(min_length=1, max_length=MAXIMUM_DOCUMENTS)
    worst: tuple[DocumentDelta, ...] = Field(default=(), max_length=MAXIMUM_WORST)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        descending = [worst.nll_delta_nats_per_token for worst in self.worst]
        if list(self.values) != sorted(self.values) or descending != sorted(descending, reverse=True):
            raise ValueError("the differences of documents ascend, and the worst come first")
        return self


class Output(Model):
    """What a model generated, greedily.

    `empty`: white space at most. `repeating`: its end repeats a sequence of up to 20 tokens three times or more, over
    at least 16 tokens.
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
    """Of one side: how many outputs are empty or repeating, and as shares of all."""

    empty: Count
    repeating: Count
    empty_share: Number
    repeating_share: Number


class Generation(Model):
    """Both models on the same prompts. Greedy generation has no chance in it, so these counts have no interval.

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
            raise ValueError(f"the counts of generation are not those of its outputs, which are {expected}")
        return self


class Quality(Model):
    """On held-out text; differences are candidate - baseline, paired by token.

    `packed`: documents were joined by EOS and scored as one text; without it, each was scored by itself.
    """

    tokens: Count
    documents: Count
    packed: bool = Field(default=False, strict=True)
    baseline: QualitySide
    candidate: QualitySide
    nll_delta_nats_per_token: Estimate
    perplexity_ratio: Estimate
    document_deltas: DocumentDeltas | None = None
    kl_nats_per_token: Number = None
    top1_agreement: Number = None
    generation: Generation | None = None

    @model_validator(mode="after")
    def _all_documents(self) -> Self:
        expected = min(self.documents, MAXIMUM_DOCUMENTS)  # none at all is for the gates to refuse
        if expected and self.document_deltas is not None and len(self.document_deltas.values) != expected:
            raise ValueError(f"document_deltas.values has {expected} values for {self.documents} documents")
        return self


class Percentiles(Model):
    """None for a percentile that so many samples do not support."""

    p50: Number = None
    p90: Number = None
    p95: Number = None
    p99: Number = None
    samples: Count


class SpeedSide(Model):
    """What only a server has is None elsewhere: TPOT, output tokens over the whole time, good requests.

    `by_repeat` has, for each ratio's name, what each repeat gave (latencies in ms), None for one with a failed request.
    """

    ttft_ms: Percentiles | None = None
    tpot_ms: Percentiles | None = None
    itl_ms: Percentiles | None = None
    e2e_ms: Percentiles | None = None
    decode_tokens_per_s: Number = None
    prefill_tokens_per_s: Number = None
    output_tokens_per_s: Number = None
    goodput_requests_per_s: Number = None
    by_repeat: dict[Metric, tuple[Number, ...]] = {}


class Ratio(Model):
    """Candidate / baseline, repeat by repeat."""

    ratio: Estimate


class NoiseFloor(Model):
    """Baseline against itself: the half-width around 1 of the ratio's 95 % interval, and what it rests on."""

    relative: Number
    neighbours: Count


class RuntimeSpeed(Model):
    """One runtime; `noise_floor` has the names of the ratios, and `looks` counts the benchmarks that were pooled.

    `dtype`: what is computed in. A server is measured at several concurrencies: `concurrency` has them all, by number,
    and the fields beside it are those of the first.
    """

    load: Facts
    runtime: Facts = {}  # provider, threads, versions, device
    dtype: Dtypes | None = None
    looks: Count = 1
    warmup: Count
    repeats: Count  # of all looks
    order: str
    failed_requests: Count
    baseline: SpeedSide
    candidate: SpeedSide
    ttft: Ratio | None = None
    tpot: Ratio | None = None
    itl: Ratio | None = None
    e2e: Ratio | None = None
    decode_tokens_per_s: Ratio | None = None
    prefill_tokens_per_s: Ratio | None = None
    output_tokens_per_s: Ratio | None = None
    goodput_requests_per_s: Ratio | None = None
    noise_floor: dict[str, NoiseFloor] = {}
    concurrency: dict[Concurrency, "RuntimeSpeed"] = {}

    @model_validator(mode="after")
    def _every_repeat(self) -> Self:
        lists = [*self.baseline.by_repeat.values(), *self.candidate.by_repeat.values()]
        if self.repeats and any(len(values) != self.repeats for values in lists):  # as above
            raise ValueError(f"by_repeat has a value for each of the {self.repeats} repeats")
        return self


class MemorySide(Model):
    """Peaks are device memory on a GPU and resident memory on a CPU; `kv_tokens` is what a server's KV cache holds."""

    peak_bytes_load: Number = None
    peak_bytes_run: Number = None
    weight_bytes: Number = None
    kv_bytes_per_token: Number = None
    kv_tokens: Number = None


class RuntimeMemory(Model):
    baseline: MemorySide
    candidate: MemorySide
    peak_bytes: SizePair
    kv_tokens: SizePair | None = None  # in the same memory


# --- verdict --------------------------------------------------------------------------------------


class GateResult(Model):
    """One gate: its rule, what it saw, and how it ended.

    `interval` holds the one-sided bounds that are judged (95 %; 97.5 % from a benchmark's second look on), `power` the
    chance that a candidate equal to the baseline passes with so many samples and this spread: None where it should not
    pass, and where there is no interval.
    """

    metric: str
    bound: Literal["point", "ci95_lower", "ci95_upper"]
    min: Number = None
    max: Number = None
    value: Number = None
    interval: tuple[Number, Number] | None = None
    samples: Count | None = None
    noise_floor: Number = None
    power: Number = None
    outcome: Literal["pass", "fail", "inconclusive"]
    reason: str
    samples_needed: Count | None = None


class Verdict(Model):
    """The gates and what they come to. A verdict that contradicts its gates cannot be made or read.

    `judged` is the digest of the report that it was given on: one that was altered afterwards cannot be read.
    """

    outcome: Outcome
    gates: tuple[GateResult, ...] = Field(min_length=1)
    judged: Sha256 | None = None

    @model_validator(mode="after")
    def _follows(self) -> Self:
        expected = overall(gate.outcome for gate in self.gates)
        if self.outcome not in (expected, "invalid environment"):
            raise ValueError(f"outcome {self.outcome!r} does not follow from the gates, which come to {expected!r}")
        return self


def overall(outcomes: Iterable[Literal["pass", "fail", "inconclusive"]]) -> Outcome:
    """One failure fails; else one inconclusive gate leaves it open; no gate at all is no pass."""
    seen = set(outcomes)
    if "fail" in seen or not seen:
        return "fail"
    return "inconclusive" if "inconclusive" in seen else "pass"


class Report(Model):
    """report.json. Sections that a run did not measure are absent, and every gate on them fails."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_by_name=True, validate_by_alias=True)

    version: Literal["numprune/report/1"] = Field(default=SCHEMA, alias="schema")
    created: AwareDatetime
    run_id: str
    identity: Identity
    environment: Environment
    pruning: Pruning | None = None
    sizes: Sizes | None = None
    quality: Quality | None = None
    speed: dict[Runtime, RuntimeSpeed] = {}
    memory: dict[Runtime, RuntimeMemory] = {}
    parity: dict[Runtime, Facts] = {}
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
            raise ValueError("the report was altered after its verdict: measure and judge again")
        return self

    @property
    def digest(self) -> str:
        """SHA-256 of everything but the verdict; what has its default does not count, so that fields can be added."""
        facts = self.model_dump(mode="json", exclude={"verdict"}, exclude_defaults=True)
        return hashlib.sha256(json.dumps(facts, sort_keys=True, allow_nan=False).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, by the names of the file."""
        return self.model_dump(mode="json", by_alias=True)

    def judged(self, verdict: Verdict) -> "Report":
        """This report with its verdict, checked again as a whole."""
        return Report.model_validate({**self.to_json(), "verdict": verdict.model_dump(mode="json")})
