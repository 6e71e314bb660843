"""Checks a language model's server against its reference answers: prefill and decode, token by token.

The same tokens are requested twice: all as one prompt (prefill), and the continuation token by token (decode, with the
KV cache). A *position* counts tokens of prompt and continuation from 0.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from numprune.errors import ParityError
from numprune.serving import loopback
from numprune.serving.reference_answers.answers import CompletionAnswers
from numprune.serving.reference_answers.asking import TIMEOUT_S, as_number, ask, check_tokenizer, distance, require_near
from numprune.serving.vllm import api_key as keys
from numprune.serving.vllm.server import ServerError

_WRONG_SHARE = 0.01  # of the greedy tokens with a clear lead


def check(url: str, reference: CompletionAnswers, dtype: str, api_key: str | None = None) -> dict[str, Any]:
    """Compare the server at `url`, which computes in `dtype` and may require an API key, with the reference.

    If the server chooses another greedy token than the reference, it continues from the reference's. Of the tokens that
    lead the second best by more than the tolerance (that of the 99th percentile, if there is one), 99 % must be equal,
    and all that lead by more than twice the tolerance.

    Returns:
        dtype, tolerance (of the worst), positions compared, the largest difference and its place (prompt, position,
            token, both values), the mean, greedy tokens compared, and the share of equal ones.

    Raises:
        ParityError: names the worst position, or the text that the server tokenizes differently.
        ServerError: the server does not respond, or returns an error.
    """
    tolerance = reference.tolerance(dtype)
    with loopback.client(url, timeout=TIMEOUT_S, headers=keys.headers(api_key)) as client:
        model = ask(client, "GET", "/v1/models")["data"][0]["id"]
        check_tokenizer(client, model, reference.texts)
        found = [*_prefill(client, model, reference)]
        limit = tolerance.worst if tolerance.p99 is None else tolerance.p99
        clear = sum(margin > limit for prompt in reference.prompts for margin in prompt.margins)
        decoded, match = _require_greedy(url, _decode(client, model, reference), clear, limit)
    found += decoded
    return {
        **require_near(url, found, tolerance, dtype, " nats"),
        "greedy_compared": len(decoded),
        "greedy_match": match,
    }


@dataclass(frozen=True)
class _Place:
    """One token's log-probability, from the server and the reference."""

    stage: str
    prompt: int
    position: int
    token: int
    server: float
    reference: float

    @property
    def error(self) -> float:
        return distance(self.server, self.reference)

    def __str__(self) -> str:
        return (
            f"{self.stage}, prompt {self.prompt}, position {self.position}, token {self.token}: the server gives "
            f"{self.server:.6g}, the reference {self.reference:.6g}"
        )


@dataclass(frozen=True)
class _Step:
    """A greedy step: `place` has the server's token; `expected` is the reference's, which led by `margin` nats."""

    place: _Place
    expected: int
    margin: float


def _prefill(client: httpx.Client, model: str, reference: CompletionAnswers) -> Iterator[_Place]:
    """The log-probability of every token but the first, given all tokens."""
    whole = [[*prompt.tokens, *prompt.greedy] for prompt in reference.prompts]
    answers = _complete(client, model, whole, max_tokens=1, prompt_logprobs=0)
    for number, (prompt, tokens, answer) in enumerate(zip(reference.prompts, whole, answers, strict=True)):
        given = answer.get("prompt_logprobs")
        if not isinstance(given, list) or len(given) != len(tokens):
            raise ServerError(f"{client.base_url}: no prompt_logprobs, or not one per token; is this vLLM?")
        expected = [*prompt.logprobs, *prompt.greedy_logprobs]
        for position, value in enumerate(expected, start=1):
            token = tokens[position]
            found = (given[position] or {}).get(str(token), {}).get("logprob")
            yield _Place("prefill", number, position, token, as_number(found), value)


def _decode(client: httpx.Client, model: str, reference: CompletionAnswers) -> Iterator[_Step]:
    """Every greedy step. After a different token, the server is asked to continue from the reference's.

    Which token has the largest log-probability may differ in a near tie; the value may not.
    """
    prompts = [prompt.tokens for prompt in reference.prompts]
    whole = _generate(client, model, prompts, max(len(prompt.greedy) for prompt in reference.prompts))
    for number, (prompt, continuation) in enumerate(zip(reference.prompts, whole, strict=True)):
        done = 0
        while done < len(prompt.greedy):
            if done:
                following = [*prompt.tokens, *prompt.greedy[:done]]
                [continuation] = _generate(client, model, [following], len(prompt.greedy) - done)
            for token, value in continuation[: len(prompt.greedy) - done]:
                position, expected = len(prompt.tokens) + done, prompt.greedy[done]
                place = _Place("decode", number, position, token, as_number(value), prompt.greedy_logprobs[done])
                yield _Step(place, expected, prompt.margins[done])
                done += 1
                if token != expected:
                    break


def _require_greedy(url: str, steps: Iterator[_Step], clear: int, limit: float) -> tuple[list[_Place], float]:
    """The places and the share of equal tokens; `clear` of them lead by more than `limit`. Raises ParityError."""
    places: list[_Place] = []
    different = wrong = 0
    for step in steps:
        places.append(step.place)
        if step.place.token != step.expected:
            different += 1
            wrong += step.margin > limit
            if step.margin > 2 * limit or wrong > _WRONG_SHARE * clear:
                raise ParityError(
                    f"{url}: {step.place} for token {step.expected}, which led by {step.margin:.3g} nats: the greedy "
                    "continuation differs"
                )
    return places, 1 - different / len(places)


def _generate(
    client: httpx.Client, model: str, prompts: Sequence[Sequence[int]], steps: int
) -> list[list[tuple[int, Any]]]:
    """The greedy continuation of each prompt: `steps` tokens with their log-probabilities. Raises ServerError."""
    answers = _complete(client, model, prompts, max_tokens=steps, logprobs=0, ignore_eos=True, return_token_ids=True)
    found = []
    for answer in answers:
        tokens = answer.get("token_ids") or []
        values = (answer.get("logprobs") or {}).get("token_logprobs") or []
        if len(tokens) != steps or len(values) != steps:
            raise ServerError(f"{client.base_url}: requested {steps} tokens with logprobs, got {len(tokens)}")
        found.append(list(zip(tokens, values, strict=True)))
    return found


def _complete(client: httpx.Client, model: str, prompts: Sequence[Sequence[int]], **options: Any) -> list[Any]:
    """One completion per prompt, greedy, with every option of the generation configuration switched off."""
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
    choices = ask(client, "POST", "/v1/completions", body).get("choices")
    if not isinstance(choices, list) or len(choices) != len(prompts):
        raise ServerError(f"{client.base_url}: sent {len(prompts)} prompts, got a different number of answers")
    return sorted(choices, key=lambda choice: int(choice["index"]))
