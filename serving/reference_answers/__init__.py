"""Reference answers: a server takes traffic only if it computes what was measured.

They are computed with transformers from the checkpoint when the release is made. For a language model: fixed prompts,
the log-probability of each of their tokens, and the greedy continuation with its log-probabilities and the margin of
each token over the runner-up. For an encoder: the embeddings or class probabilities of fixed texts.

Log-probabilities are natural logarithms.
"""

from typing import Any

from numprune.errors import InputError
from numprune.serving.reference_answers import completions, pooled
from numprune.serving.reference_answers.answers import (
    FILE_NAME,
    FILE_NAMES,
    MINIMUM_STEPS,
    TOLERANCES,
    CompletionAnswers,
    Encoded,
    Noise,
    PooledAnswers,
    PooledText,
    Prompt,
    ReferenceAnswers,
    Rounding,
    Tolerance,
    read,
)
from numprune.serving.reference_answers.pooled import PATHS

__all__ = [
    "FILE_NAME",
    "FILE_NAMES",
    "MINIMUM_STEPS",
    "PATHS",
    "TOLERANCES",
    "CompletionAnswers",
    "Encoded",
    "Noise",
    "PooledAnswers",
    "PooledText",
    "Prompt",
    "ReferenceAnswers",
    "Rounding",
    "Tolerance",
    "check",
    "read",
    "told",
]


def check(url: str, reference: ReferenceAnswers, dtype: str, api_key: str | None = None) -> dict[str, Any]:
    """Check the server at `url`: see `completions.check` and `pooled.check`, also for the errors raised.

    Raises InputError if there is no tolerance for `dtype`.
    """
    if dtype not in TOLERANCES:
        raise InputError(f"dtype is {dtype!r}; servers can be checked in {', '.join(TOLERANCES)}")
    if isinstance(reference, PooledAnswers):
        return pooled.check(url, reference, dtype, api_key)
    return completions.check(url, reference, dtype, api_key)


def told(found: dict[str, Any]) -> str:
    """The result of `check` in words."""
    worst, limit, p99 = found["worst"]["error"], found["tolerance"], found["p99_tolerance"]
    also = "" if p99 is None else f", 99th percentile {found['p99_error']:.2g} (limit {p99:.2g})"
    if "greedy_match" in found:
        of_all = f"{found['greedy_match']:.0%} of greedy tokens"
        return f"largest log-probability difference {worst:.2g} nats (limit {limit:g}){also}, {of_all}"
    return f"largest difference over {found['positions']} numbers {worst:.2g} (limit {limit:g}){also}"
