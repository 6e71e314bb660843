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


def check(url: str, reference: CompletionAnswers, dtype: str, api_key: str | None = None) -> dict[str, Any]:
    """Compare the server at `url`, which computes in `dtype` and may require an API key, with the reference.

    The greedy tokens must be the reference's; if the second best token is within twice the tolerance, either is
    accepted, and what follows a different token is not compared (the first pass still compares it).

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
        decoded, equal = _decode(client, model, reference, tolerance.worst)
    found += decoded
    return {
        **require_near(url, found, tolerance, dtype, " nats"),
        "greedy_compared": len(decoded),
        "greedy_match": equal / sum(len(prompt.greedy) for prompt in reference.prompts),
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


def _decode(
    client: httpx.Client, model: str, reference: CompletionAnswers, tolerance: float
) -> tuple[list[_Place], int]:
    """The greedy continuations: comparable log-probabilities, and the number of equal tokens."""
    steps = max(len(prompt.greedy) for prompt in reference.prompts)
    prompts = [prompt.tokens for prompt in reference.prompts]
    answers = _complete(client, model, prompts, max_tokens=steps, logprobs=0, ignore_eos=True, return_token_ids=True)
    places: list[_Place] = []
    equal = 0
    for number, (prompt, answer) in enumerate(zip(reference.prompts, answers, strict=True)):
        tokens = answer.get("token_ids") or []
        values = (answer.get("logprobs") or {}).get("token_logprobs") or []
        if len(tokens) != steps or len(values) != steps:
            raise ServerError(f"{client.base_url}: requested {steps} tokens with logprobs, got {len(tokens)}")
        for step, (token, value, expected) in enumerate(zip(tokens, values, prompt.greedy, strict=False)):
            place = _Place(
                "decode", number, len(prompt.tokens) + step, token, as_number(value), prompt.greedy_logprobs[step]
            )
            if token != expected:
                if prompt.margins[step] > 2 * tolerance:
                    raise ParityError(
                        f"{client.base_url}: {place} for token {expected}, which led by {prompt.margins[step]:.3g} "
                        "nats: the greedy continuation differs"
                    )
                break
            places.append(place)
            equal += 1
    return places, equal


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
