"""The canary: a live server computes what was measured, or takes no traffic.

The reference is made when the release is made, from the checkpoint with transformers: of a language model fixed
prompts, the log-probability of each of their tokens, the greedy continuation with its log-probabilities and the margin
by which each of its tokens won; of an encoder the embeddings or the class probabilities of fixed texts.

Log-probabilities are natural logarithms.
"""

from typing import Any

from numprune.errors import InputError
from numprune.serving.canary import completions, pooled
from numprune.serving.canary.pooled import PATHS
from numprune.serving.canary.reference import (
    MINIMUM_STEPS,
    REFERENCE,
    TOLERANCES,
    Encoded,
    PooledReference,
    PooledText,
    Prompt,
    Reference,
    Rounding,
    Tolerance,
    read,
)

__all__ = [
    "MINIMUM_STEPS",
    "PATHS",
    "REFERENCE",
    "TOLERANCES",
    "Encoded",
    "PooledReference",
    "PooledText",
    "Prompt",
    "Reference",
    "Rounding",
    "Tolerance",
    "check",
    "read",
    "told",
]


def check(url: str, reference: Reference | PooledReference, dtype: str, api_key: str | None = None) -> dict[str, Any]:
    """Compare the server at `url`: see `completions.check` and `pooled.check`, also for what is raised.

    Raises InputError where there is no tolerance for `dtype`.
    """
    if dtype not in TOLERANCES:
        raise InputError(f"dtype is {dtype!r}; the canary knows {', '.join(TOLERANCES)}")
    if isinstance(reference, PooledReference):
        return pooled.check(url, reference, dtype, api_key)
    return completions.check(url, reference, dtype, api_key)


def told(found: dict[str, Any]) -> str:
    """What `check` found, in words."""
    worst, limit = found["worst"]["error"], found["tolerance"]
    if "greedy_match" in found:
        of_all = f"{found['greedy_match']:.0%} of greedy tokens"
        return f"worst difference of a log-probability {worst:.2g} nats (limit {limit:g}), {of_all}"
    return f"worst difference of {found['positions']:,} numbers {worst:.2g} (limit {limit:g})"
