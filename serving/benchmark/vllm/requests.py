"""Results of one run of `vllm bench serve`."""

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from numprune.errors import IntegrityError
from numprune.serving.benchmark.samples import ENERGY
from numprune.serving.benchmark.scheduler import ThreadTimes
from numprune.serving.benchmark.vllm.load import ServedLoad
from numprune.serving.problems import problems

METRICS = (
    *("ttft", "tpot", "itl", "e2e"),
    *("decode_tokens_per_s", "prefill_tokens_per_s", "output_tokens_per_s", "goodput_requests_per_s"),
)

_TOGETHER_MS = 0.05  # two tokens closer than this were read together: no model generates them so fast

_Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _File(BaseModel):
    """The part of its JSON that is used; each list has one item per request, in seconds."""

    model_config = ConfigDict(extra="ignore")

    duration: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    completed: int
    failed: int
    request_goodput: Annotated[float | None, Field(ge=0, allow_inf_nan=False)]
    input_lens: list[int]
    output_lens: list[int]
    ttfts: list[_Seconds]
    itls: list[list[_Seconds]]
    errors: list[str]


@dataclass(frozen=True)
class Request:
    """A successful request, in ms since it was sent. `itl_ms`: gaps between chunks of the response, one token each
    unless the server sent several at once.
    """

    prompt_tokens: int
    output_tokens: int
    ttft_ms: float
    itl_ms: tuple[float, ...]

    @property
    def e2e_ms(self) -> float:
        return self.ttft_ms + sum(self.itl_ms)

    @property
    def tpot_ms(self) -> float:
        """Time per output token after the first, however the tokens were grouped into chunks."""
        return sum(self.itl_ms) / (self.output_tokens - 1)


@dataclass(frozen=True)
class Requests:
    """One run of the load at one concurrency, with the seconds that the server's threads ran and waited for a CPU.

    `joules`: energy of the GPU during it, including idle time of the server; None if it was not measured.
    """

    concurrency: int
    succeeded: tuple[Request, ...]
    errors: tuple[str, ...]  # one per failed request
    duration_s: float
    goodput_requests_per_s: float
    threads: ThreadTimes
    joules: float | None = None

    @property
    def failed(self) -> int:
        """Requests."""
        return len(self.errors)

    def metrics(self) -> dict[str, float]:
        """One number per metric, NaN if missing; medians for latencies, in ms.

        `decode_tokens_per_s` is the combined rate of all streams while none waits for its first token, at concurrency 1
        the same as in other runtimes; `output_tokens_per_s` is all tokens divided by the whole duration.
        """
        requests, generated = self.succeeded, sum(request.output_tokens for request in self.succeeded)
        decode_s = sum(request.e2e_ms - request.ttft_ms for request in requests) / 1e3
        prefill_s = sum(request.ttft_ms for request in requests) / 1e3
        return {
            "ttft": _median([request.ttft_ms for request in requests]),
            "tpot": _median([request.tpot_ms for request in requests]),
            "itl": _median([step for request in requests for step in request.itl_ms]),
            "e2e": _median([request.e2e_ms for request in requests]),
            "decode_tokens_per_s": _rate(
                self.concurrency * sum(request.output_tokens - 1 for request in requests), decode_s
            ),
            "prefill_tokens_per_s": _rate(
                self.concurrency * sum(request.prompt_tokens for request in requests), prefill_s
            ),
            "output_tokens_per_s": _rate(generated, self.duration_s),
            "goodput_requests_per_s": self.goodput_requests_per_s,
            **({} if self.joules is None else {ENERGY: _rate(self.joules, generated)}),
        }

    def to_json(self) -> dict[str, Any]:
        """Every request as plain JSON, so that looks can be pooled later."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Requests":
        """The inverse of `to_json`."""
        succeeded = (Request(**{**request, "itl_ms": tuple(request["itl_ms"])}) for request in data["succeeded"])
        threads = ThreadTimes(**data["threads"])
        return cls(**{**data, "succeeded": tuple(succeeded), "errors": tuple(data["errors"]), "threads": threads})


def read_requests(file: Path, load: ServedLoad, concurrency: int, threads: ThreadTimes) -> Requests:
    """Read a result file. A request with other token counts than requested has failed.

    Raises IntegrityError if the file does not cover every request.
    """
    try:
        found = _File.model_validate_json(file.read_bytes())
    except ValidationError as error:
        raise IntegrityError(f"{file.name} of vllm bench serve: {problems(error)}") from None
    count = load.requests(concurrency)
    told = {len(part) for part in (found.input_lens, found.output_lens, found.ttfts, found.itls, found.errors)}
    if told != {count} or found.completed + found.failed != count:
        raise IntegrityError(f"{file.name} of vllm bench serve: does not contain each of {count} requests once")
    succeeded, errors = [], []
    rows = zip(found.input_lens, found.output_lens, found.ttfts, found.itls, found.errors, strict=True)
    for prompt, output, ttft, itls, reason in rows:
        if (prompt, output) == (load.prompt_length, load.output_length) and not reason:
            itl_ms = tuple(step * 1e3 for step in itls)
            succeeded.append(Request(prompt, output, ttft * 1e3, itl_ms))
        else:
            last = reason.strip().splitlines()[-1] if reason.strip() else "no error was reported"
            errors.append(f"{output} of {load.output_length} tokens for {prompt} of {load.prompt_length}: {last}")
    if len(errors) < found.failed:
        raise IntegrityError(f"{file.name} of vllm bench serve: {found.failed} failed, but does not say which")
    return Requests(
        concurrency=concurrency,
        succeeded=tuple(succeeded),
        errors=tuple(errors),
        duration_s=found.duration,
        goodput_requests_per_s=found.request_goodput or 0.0,
        threads=threads,
    )


def packed_share(repeats: Iterable[Requests]) -> float:
    """The share of tokens, excluding each request's first, that arrived with the previous one: their timing is the
    reader's.

    0 if there are none.
    """
    requests = [request for repeat in repeats for request in repeat.succeeded]
    apart = sum(step >= _TOGETHER_MS for request in requests for step in request.itl_ms)
    after_first = sum(request.output_tokens - 1 for request in requests)
    return 1 - apart / after_first if after_first else 0.0


def _median(values: list[float]) -> float:
    return statistics.median(values) if values else math.nan


def _rate(amount: float, each: float) -> float:
    return amount / each if each > 0 else math.nan
