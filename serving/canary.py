"""The canary: a live server computes what was measured, or takes no traffic.

The reference is made when the release is made, from the checkpoint in float32: fixed prompts, the log-probability of
each of their tokens, the greedy continuation with its log-probabilities and the margin by which each of its tokens won.
The server is asked for the same twice: all tokens as one prompt (prefill), and the continuation token by token (decode,
with its cache).

Log-probabilities are natural logarithms. A *position* counts tokens of prompt and continuation from 0.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import httpx
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from numprune.errors import InputError, IntegrityError, ParityError
from numprune.serving import loopback
from numprune.serving.problems import problems
from numprune.serving.vllm import api_key as keys
from numprune.serving.vllm.server import ServerError

REFERENCE = "canary.json"  # in a release
MINIMUM_STEPS = 32  # greedy tokens
MAXIMUM_BYTES = 16 << 20
_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Tolerance:
    """Allowed differences of log-probabilities, in nats: of any single one, and of all on average."""

    worst: float
    mean: float


# The least tolerances. Measured with the embedded model (worst, mean; vLLM 0.32 on a CPU): float32 1e-5, 2e-6; bfloat16
# 0.14, 0.015; float16 0.01, 0.002. Weights of another release change the mean by whole nats.
TOLERANCES = {
    "float32": Tolerance(1e-3, 1e-3),
    "bfloat16": Tolerance(0.5, 0.05),
    "float16": Tolerance(0.1, 0.01),
}
# Checkpoints with large hidden values round by far more: SmolLM2-135M with half of it removed by 6.7, 0.18 in bfloat16,
# in transformers itself. The tolerance is at least this multiple of that error, which the reference holds.
_ROUNDING_FACTOR = 4

Finite = Annotated[float, Field(allow_inf_nan=False)]
LogProbability = Annotated[float, Field(le=1e-6, allow_inf_nan=False)]
Token = Annotated[int, Field(ge=0)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Prompt(_Model):
    """One prompt and what must come of it.

    `logprobs[i]` is of `tokens[i + 1]`, given all before it; `greedy_logprobs[i]` of `greedy[i]`; `margins[i]` is how
    far the second best token was behind, in nats.
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
            raise ValueError("greedy, greedy_logprobs and margins must be of the same length")
        return self


class Encoded(_Model):
    """A text and the tokens that the model's tokenizer makes of it, without special ones."""

    text: str
    tokens: list[Token]


class Rounding(_Model):
    """Errors of log-probabilities, in nats: the largest and the mean."""

    worst: Annotated[Finite, Field(ge=0)]
    mean: Annotated[Finite, Field(ge=0)]


class Reference(_Model):
    """What a server of the release must answer.

    `rounding` holds transformers' own error in each precision, without those in which the model overflows. Older
    releases have none.
    """

    schema_: Literal["numprune/canary/1"] = Field(default="numprune/canary/1", alias="schema")
    texts: list[Encoded] = Field(min_length=1)
    prompts: list[Prompt] = Field(min_length=1)
    rounding: dict[str, Rounding] = {}

    def tolerance(self, dtype: str) -> Tolerance:
        """For a server that computes in `dtype`, one of `TOLERANCES`."""
        least, rounding = TOLERANCES[dtype], self.rounding.get(dtype)
        if rounding is None:
            return least
        return Tolerance(
            max(least.worst, _ROUNDING_FACTOR * rounding.worst), max(least.mean, _ROUNDING_FACTOR * rounding.mean)
        )

    @property
    def length(self) -> int:
        """Of the longest sequence, prompt and continuation: a server's context must hold one token more."""
        return max(len(prompt.tokens) + len(prompt.greedy) for prompt in self.prompts)

    def write(self, path: Path) -> None:
        path.write_text(self.model_dump_json(by_alias=True) + "\n", encoding="utf-8")


def read(path: Path) -> Reference:
    """The reference of a release. Raises IntegrityError."""
    if not path.is_file():
        raise IntegrityError(
            f"{path}: missing; the release was made before releases carried a reference for servers: make it again"
        )
    if path.stat().st_size > MAXIMUM_BYTES:
        raise IntegrityError(f"{path}: exceeds the {MAXIMUM_BYTES:,}-byte limit")
    try:
        return Reference.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise IntegrityError(f"{path}: {problems(error)}") from None


def check(url: str, reference: Reference, dtype: str, api_key: str | None = None) -> dict[str, Any]:
    """Compare the server at `url`, which computes in `dtype` and may want an API key, with the reference.

    The greedy tokens must be the reference's; where its second best token was as near as twice the tolerance, either is
    right, and what follows a different one is not compared any more (the first pass compares it all the same).

    Returns:
        dtype, tolerance (of the worst), positions compared, the worst difference and where it is (prompt, position,
        token, both values), the mean, greedy tokens compared, and the share of equal ones among all.

    Raises:
        InputError: no tolerance for `dtype`.
        ParityError: names the worst position, or the text that the server's tokenizer reads otherwise.
        ServerError: the server does not answer, or with an error.
    """
    if dtype not in TOLERANCES:
        raise InputError(f"dtype is {dtype!r}; the canary knows {', '.join(TOLERANCES)}")
    tolerance = reference.tolerance(dtype)
    with loopback.client(url, timeout=_TIMEOUT_S, headers=keys.headers(api_key)) as client:
        model = _ask(client, "GET", "/v1/models")["data"][0]["id"]
        _check_tokenizer(client, model, reference)
        found = [*_prefill(client, model, reference)]
        decoded, equal = _decode(client, model, reference, tolerance.worst)
    found += decoded
    worst = max(found, key=lambda place: place.error)
    mean = sum(place.error for place in found) / len(found)
    if not (worst.error <= tolerance.worst and mean <= tolerance.mean):
        raise ParityError(
            f"{url}: {worst}: differs by {worst.error:.3g} nats, by {mean:.3g} on average; in {dtype} allowed are "
            f"{tolerance.worst:.3g} and {tolerance.mean:.3g}"
        )
    return {
        "dtype": dtype,
        "tolerance": tolerance.worst,
        "positions": len(found),
        "worst": {**vars(worst), "error": worst.error},
        "mean_error": mean,
        "greedy_compared": len(decoded),
        "greedy_match": equal / sum(len(prompt.greedy) for prompt in reference.prompts),
    }


@dataclass(frozen=True)
class _Place:
    """One token's log-probability, here and there."""

    stage: str
    prompt: int
    position: int
    token: int
    server: float
    reference: float

    @property
    def error(self) -> float:
        """Infinite, should either be no number: every comparison with NaN is false, and a maximum may pass it over."""
        difference = abs(self.server - self.reference)
        return difference if math.isfinite(difference) else math.inf

    def __str__(self) -> str:
        return (
            f"{self.stage}, prompt {self.prompt}, position {self.position}, token {self.token}: the server gives "
            f"{self.server:.6g}, the reference {self.reference:.6g}"
        )


def _check_tokenizer(client: httpx.Client, model: str, reference: Reference) -> None:
    for text in reference.texts:
        body = {"model": model, "prompt": text.text, "add_special_tokens": False}
        tokens = _ask(client, "POST", "/tokenize", body).get("tokens")
        if tokens != text.tokens:
            raise ParityError(
                f"{client.base_url}: the server's tokenizer reads {text.text[:40]!r} as {_short(tokens)}, that of the "
                f"release as {_short(text.tokens)}; it is another model's"
            )


def _prefill(client: httpx.Client, model: str, reference: Reference) -> Iterator[_Place]:
    """The log-probability of every token but the first, all tokens given."""
    whole = [[*prompt.tokens, *prompt.greedy] for prompt in reference.prompts]
    answers = _complete(client, model, whole, max_tokens=1, prompt_logprobs=0)
    for number, (prompt, tokens, answer) in enumerate(zip(reference.prompts, whole, answers, strict=True)):
        given = answer.get("prompt_logprobs")
        if not isinstance(given, list) or len(given) != len(tokens):
            raise ServerError(f"{client.base_url}: gives no prompt_logprobs, or not one per token; is it vLLM?")
        expected = [*prompt.logprobs, *prompt.greedy_logprobs]
        for position, value in enumerate(expected, start=1):
            token = tokens[position]
            found = (given[position] or {}).get(str(token), {}).get("logprob")
            yield _Place("prefill", number, position, token, _number(found), value)


def _decode(client: httpx.Client, model: str, reference: Reference, tolerance: float) -> tuple[list[_Place], int]:
    """The greedy continuations: log-probabilities as far as they can be compared, and how many tokens are equal."""
    steps = max(len(prompt.greedy) for prompt in reference.prompts)
    prompts = [prompt.tokens for prompt in reference.prompts]
    answers = _complete(client, model, prompts, max_tokens=steps, logprobs=0, ignore_eos=True, return_token_ids=True)
    places: list[_Place] = []
    equal = 0
    for number, (prompt, answer) in enumerate(zip(reference.prompts, answers, strict=True)):
        tokens = answer.get("token_ids") or []
        values = (answer.get("logprobs") or {}).get("token_logprobs") or []
        if len(tokens) != steps or len(values) != steps:
            raise ServerError(f"{client.base_url}: asked for {steps} tokens with their logprobs, got {len(tokens)}")
        for step, (token, value, expected) in enumerate(zip(tokens, values, prompt.greedy, strict=False)):
            place = _Place(
                "decode", number, len(prompt.tokens) + step, token, _number(value), prompt.greedy_logprobs[step]
            )
            if token != expected:
                if prompt.margins[step] > 2 * tolerance:
                    raise ParityError(
                        f"{client.base_url}: {place} for token {expected}, which led by {prompt.margins[step]:.3g} "
                        "nats: the greedy continuation is another one"
                    )
                break
            places.append(place)
            equal += 1
    return places, equal


def _complete(client: httpx.Client, model: str, prompts: Sequence[Sequence[int]], **options: Any) -> list[Any]:
    """One answer per prompt, greedy, with nothing that the model's generation configuration may have switched on."""
    body = {
        "model": model,
        "prompt": prompts,
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        **options,
    }
    choices = _ask(client, "POST", "/v1/completions", body).get("choices")
    if not isinstance(choices, list) or len(choices) != len(prompts):
        raise ServerError(f"{client.base_url}: asked with {len(prompts)} prompts, answered otherwise")
    return sorted(choices, key=lambda choice: int(choice["index"]))


def _ask(client: httpx.Client, method: str, path: str, body: Any = None) -> Any:
    try:
        answer = client.request(method, path, json=body)
        if answer.is_success:
            return answer.json()
    except httpx.TransportError as error:
        raise ServerError(f"{client.base_url}: {path} was not answered ({error or type(error).__name__})") from None
    except ValueError:
        raise ServerError(f"{client.base_url}: {path} was answered with something that is not JSON") from None
    if answer.status_code == httpx.codes.UNAUTHORIZED:
        raise ServerError(f"{client.base_url}: {keys.refused(client.headers.get('Authorization'))}")
    raise ServerError(f"{client.base_url}: {path} was answered with {answer.status_code}: {_short(answer.text)}")


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 200 else f"{text[:197]}..."
