"""Checks an encoder's server against its reference answers: embeddings or class probabilities, number by number."""

import math
from dataclasses import dataclass
from typing import Any

from numprune.errors import ParityError
from numprune.serving import loopback
from numprune.serving.reference_answers.answers import PooledAnswers
from numprune.serving.reference_answers.asking import TIMEOUT_S, as_number, ask, check_tokenizer, distance, require_near
from numprune.serving.vllm import api_key as keys
from numprune.serving.vllm.server import ServerError

# By task: the endpoint, and the field of the response with the numbers.
PATHS = {"embedding": ("/v1/embeddings", "embedding"), "classification": ("/classify", "probs")}


@dataclass(frozen=True)
class _Place:
    """One number, from the server and the reference."""

    text: int
    entry: int
    server: float
    reference: float

    @property
    def error(self) -> float:
        return distance(self.server, self.reference)

    def __str__(self) -> str:
        return (
            f"text {self.text}, entry {self.entry}: the server gives {self.server:.6g}, the reference "
            f"{self.reference:.6g}"
        )


def check(url: str, reference: PooledAnswers, dtype: str, api_key: str | None = None) -> dict[str, Any]:
    """Compare the server at `url`, which computes in `dtype` and may require an API key, with the reference.

    All texts go into one request, so that they run in one batch. Embeddings are compared at length 1.

    Returns:
        dtype, tolerance (of the worst), texts and positions (numbers) compared, the largest difference and its place
            (text, entry, both values), the mean.

    Raises:
        ParityError: names the worst number, or the text that the server tokenizes differently.
        ServerError: the server does not respond, or returns an error.
    """
    tolerance = reference.tolerance(dtype)
    with loopback.client(url, timeout=TIMEOUT_S, headers=keys.headers(api_key)) as client:
        model = ask(client, "GET", "/v1/models")["data"][0]["id"]
        check_tokenizer(client, model, reference.texts)
        path, name = PATHS[reference.task]
        inputs = [text.tokens for text in reference.inputs]
        answers = ask(client, "POST", path, {"model": model, "input": inputs}).get("data")
    if not isinstance(answers, list) or len(answers) != len(inputs):
        raise ServerError(f"{url}: sent {len(inputs)} texts to {path}, got a different number of answers")
    found = []
    for number, (text, answer) in enumerate(zip(reference.inputs, answers, strict=True)):
        values = [as_number(value) for value in answer.get(name) or []]
        if len(values) != len(text.values):
            raise ParityError(
                f"{url}: text {number}: the server gives {len(values)} numbers, the reference {len(text.values)}; it "
                "serves another model"
            )
        if reference.task == "embedding":
            norm = math.hypot(*values) or math.nan
            values = [value / norm for value in values]
        found += [_Place(number, entry, *pair) for entry, pair in enumerate(zip(values, text.values, strict=True))]
    return {**require_near(url, found, tolerance, dtype), "texts": len(inputs)}
