"""Requests to a server under check."""

import math
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import httpx

from numprune.errors import ParityError
from numprune.serving.reference_answers.answers import Encoded, Tolerance
from numprune.serving.vllm import api_key as keys
from numprune.serving.vllm.server import ServerError

TIMEOUT_S = 300.0


def ask(client: httpx.Client, method: str, path: str, body: Any = None) -> Any:
    """The server's JSON response. Raises ServerError."""
    try:
        answer = client.request(method, path, json=body)
        if answer.is_success:
            return answer.json()
    except httpx.TransportError as error:
        raise ServerError(f"{client.base_url}: no response to {path} ({error or type(error).__name__})") from None
    except ValueError:
        raise ServerError(f"{client.base_url}: the response to {path} is not JSON") from None
    if answer.status_code == httpx.codes.UNAUTHORIZED:
        raise ServerError(f"{client.base_url}: {keys.refused(client.headers.get('Authorization'))}")
    raise ServerError(f"{client.base_url}: {path} returned {answer.status_code}: {short(answer.text)}")


def check_tokenizer(client: httpx.Client, model: str, texts: Sequence[Encoded]) -> None:
    """Raises ParityError naming the first text that the server tokenizes differently."""
    for text in texts:
        body = {"model": model, "prompt": text.text, "add_special_tokens": False}
        tokens = ask(client, "POST", "/tokenize", body).get("tokens")
        if tokens != text.tokens:
            raise ParityError(
                f"{client.base_url}: the server's tokenizer reads {text.text[:40]!r} as {short(tokens)}, the release's "
                f"as {short(text.tokens)}; it belongs to another model"
            )


def as_number(value: Any) -> float:
    """NaN for anything but a number."""
    return float(value) if isinstance(value, int | float) else math.nan


def distance(server: float, reference: float) -> float:
    """Infinite if either is NaN: comparisons with NaN are false, and a maximum may skip it."""
    difference = abs(server - reference)
    return difference if math.isfinite(difference) else math.inf


class Place(Protocol):
    """A number from the server and from the reference; its text gives the position."""

    @property
    def error(self) -> float: ...


P = TypeVar("P", bound=Place)


def require_near(url: str, found: Sequence[P], tolerance: Tolerance, dtype: str, unit: str = "") -> dict[str, Any]:
    """Summarize all compared places for `check`. Raises ParityError naming the worst."""
    errors = sorted(place.error for place in found)
    worst = max(found, key=lambda place: place.error)
    mean, p99 = sum(errors) / len(errors), errors[math.ceil(0.99 * len(errors)) - 1]
    limits = [(worst.error, tolerance.worst, ""), (mean, tolerance.mean, " on average")]
    if tolerance.p99 is not None:
        limits.append((p99, tolerance.p99, " at the 99th percentile"))
    if not all(error <= limit for error, limit, _ in limits):
        differs = ", by ".join(f"{error:.3g}{unit if not where else ''}{where}" for error, _, where in limits)
        allowed = ", ".join(f"{limit:.3g}" for _, limit, _ in limits)
        raise ParityError(f"{url}: {worst}: differs by {differs}; allowed in {dtype}: {allowed}")
    return {
        "dtype": dtype,
        "tolerance": tolerance.worst,
        "positions": len(found),
        "worst": {**vars(worst), "error": worst.error},
        "mean_error": mean,
        "mean_tolerance": tolerance.mean,
        "p99_error": p99,
        "p99_tolerance": tolerance.p99,
    }


def short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 200 else f"{text[:197]}..."
