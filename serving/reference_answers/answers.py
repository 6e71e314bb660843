"""The reference answers of a release: what its server must return."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from numprune.errors import IntegrityError
from numprune.serving.problems import problems

FILE_NAME = "reference-answers.json"  # in a release
FILE_NAMES = (FILE_NAME, "canary.json")  # the second name is that of earlier releases
MINIMUM_STEPS = 32  # greedy tokens
MAXIMUM_BYTES = 16 << 20


@dataclass(frozen=True)
class Tolerance:
    """Allowed differences: of any single number, on average and, of quantized models, at the 99th percentile."""

    worst: float
    mean: float
    p99: float | None = None


# The smallest tolerances of log-probabilities, in nats. Measured with the embedded model on vLLM 0.32 for CPUs (worst,
# mean): float32 1e-5, 2e-6; bfloat16 0.14, 0.015; float16 0.01, 0.002. The weights of another release change the mean
# by several nats.
TOLERANCES = {
    "float32": Tolerance(1e-3, 1e-3),
    "bfloat16": Tolerance(0.5, 0.05),
    "float16": Tolerance(0.1, 0.01),
}
# For entries of unit-length embeddings, and for class probabilities.
POOLED_TOLERANCES = {
    "float32": Tolerance(1e-4, 2e-5),
    "bfloat16": Tolerance(0.03, 0.005),
    "float16": Tolerance(0.005, 0.001),
}
# Checkpoints with large hidden values have far larger rounding errors: SmolLM2-135M at half size 6.7 and 0.18 in
# bfloat16, in transformers itself. The tolerance is at least this multiple of that error, which the reference records.
_ROUNDING_FACTOR = 4
# Multiple of a quantized model's own error. Half precision moves some activations to another 8-bit step, so this error
# exceeds that of the unquantized model: 0.061 on average instead of 0.013 for the embedded model in FP8, computed in
# bfloat16.
_QUANTIZED_FACTOR = 2
_LEAST_P99 = 0.5  # share of the smallest tolerance of the worst

Finite = Annotated[float, Field(allow_inf_nan=False)]
LogProbability = Annotated[float, Field(le=1e-6, allow_inf_nan=False)]
Token = Annotated[int, Field(ge=0)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Prompt(_Model):
    """One prompt and the expected answer.

    `logprobs[i]` is of `tokens[i + 1]`, given all before it; `greedy_logprobs[i]` of `greedy[i]`; `margins[i]` is the
    lead over the second best token, in nats.
    """

    tokens: list[Token] = Field(min_length=1)
    logprobs: list[LogProbability]
    greedy: list[Token] = Field(min_length=MINIMUM_STEPS)
    greedy_logprobs: list[LogProbability]
    margins: list[Annotated[Finite, Field(ge=0)]]

    @model_validator(mode="after")
    def _lengths(self) -> "Prompt":
        if len(self.logprobs) != len(self.tokens) - 1:
            raise ValueError("logprobs must have a value for every token but the first")
        if not len(self.greedy) == len(self.greedy_logprobs) == len(self.margins):
            raise ValueError("greedy, greedy_logprobs and margins must have the same length")
        return self


class Encoded(_Model):
    """A text and its tokens from the model's tokenizer, without special tokens."""

    text: str
    tokens: list[Token]


class Rounding(_Model):
    """Errors of the compared numbers: largest, mean and, of quantized releases, the 99th percentile."""

    worst: Annotated[Finite, Field(ge=0)]
    mean: Annotated[Finite, Field(ge=0)]
    p99: Annotated[Finite, Field(ge=0)] | None = None


class Noise(_Model):
    """Mean and 99th percentile of the errors."""

    mean: Annotated[Finite, Field(ge=0)]
    p99: Annotated[Finite, Field(ge=0)]


class _Answers(_Model):
    """The fields of all reference answers.

    Attributes:
        rounding: transformers' own error in each precision, except those in which the model overflows.
        noise_floor: for a quantized release, transformers' own error in half precision on the unquantized model. Other
            and older releases have none.
    """

    least: ClassVar[Mapping[str, Tolerance]]

    texts: list[Encoded] = Field(min_length=1)
    rounding: dict[str, Rounding] = Field(default={})
    noise_floor: dict[str, Noise] = Field(default={})

    def tolerance(self, dtype: str) -> Tolerance:
        """The tolerance for a server that computes in `dtype`, one of `TOLERANCES`."""
        least, rounding, floor = self.least[dtype], self.rounding.get(dtype), self.noise_floor.get(dtype)
        worst = max(least.worst, _ROUNDING_FACTOR * rounding.worst) if rounding else least.worst
        if floor is None:
            return Tolerance(worst, max(least.mean, _ROUNDING_FACTOR * rounding.mean) if rounding else least.mean)
        own = (rounding.mean, rounding.p99 or 0.0) if rounding else (0.0, 0.0)
        mean, p99 = (
            max(_ROUNDING_FACTOR * before, _QUANTIZED_FACTOR * after)
            for before, after in zip((floor.mean, floor.p99), own, strict=True)
        )
        return Tolerance(worst, max(least.mean, mean), max(_LEAST_P99 * least.worst, p99))

    def write(self, release: Path) -> None:
        # Without noise floor and percentiles, earlier versions of numprune can read it.
        absent = None if self.noise_floor else {"noise_floor"}
        content = self.model_dump_json(by_alias=True, exclude=absent, exclude_none=True)
        (release / FILE_NAME).write_text(f"{content}\n", encoding="utf-8")


class CompletionAnswers(_Answers):
    """The expected answers of a causal language model's server. Older releases have no `rounding`."""

    least = TOLERANCES

    schema_: Literal["numprune/reference-answers/1", "numprune/canary/1"] = Field(
        default="numprune/reference-answers/1", alias="schema"
    )
    prompts: list[Prompt] = Field(min_length=1)

    @property
    def length(self) -> int:
        """The longest sequence, prompt and continuation; a server's context must hold one more token."""
        return max(len(prompt.tokens) + len(prompt.greedy) for prompt in self.prompts)


class PooledText(_Model):
    """The tokens of a text, including special ones, and the expected numbers (see PooledAnswers)."""

    tokens: list[Token] = Field(min_length=1)
    values: list[Finite] = Field(min_length=1)


class PooledAnswers(_Answers):
    """The expected answers of an encoder's server: embeddings normalized to length 1, or class probabilities."""

    least = POOLED_TOLERANCES

    schema_: Literal["numprune/reference-answers-pooled/1", "numprune/canary-pooled/1"] = Field(
        default="numprune/reference-answers-pooled/1", alias="schema"
    )
    task: Literal["embedding", "classification"]
    inputs: list[PooledText] = Field(min_length=1)

    @property
    def length(self) -> int:
        """The longest text."""
        return max(len(text.tokens) for text in self.inputs)


ReferenceAnswers = CompletionAnswers | PooledAnswers
_ADAPTER: TypeAdapter[ReferenceAnswers] = TypeAdapter(Annotated[ReferenceAnswers, Field(discriminator="schema_")])


def read(release: Path) -> ReferenceAnswers:
    """Read the reference answers of a release. Raises IntegrityError."""
    path = next((release / name for name in FILE_NAMES if (release / name).is_file()), None)
    if path is None:
        raise IntegrityError(
            f"{release / FILE_NAME}: missing; masked language models and image generators cannot be served. Other "
            "releases without it were made by an earlier version: run `numprune optimize` again"
        )
    if path.stat().st_size > MAXIMUM_BYTES:
        raise IntegrityError(f"{path}: exceeds the {MAXIMUM_BYTES:,}-byte limit")
    try:
        return _ADAPTER.validate_json(path.read_bytes())
    except ValidationError as error:
        raise IntegrityError(f"{path}: {problems(error)}") from None
