"""Amounts with their noun."""

import pytest

from numprune.counted import counted


@pytest.mark.parametrize(
    ("amount", "what", "text"),
    [
        (1, "KV group per layer", "1 KV group per layer"),
        (4, "KV group per layer", "4 KV groups per layer"),
        (0, "request", "0 requests"),
        (1, "window of 512 tokens", "1 window of 512 tokens"),
        (193_000, "window of 512 tokens", "193,000 windows of 512 tokens"),
    ],
)
def test_one_is_singular_and_all_else_plural(amount: int, what: str, text: str) -> None:
    assert counted(amount, what) == text
