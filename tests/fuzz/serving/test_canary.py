from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given

from numprune.errors import NumpruneError
from numprune.serving import canary
from tests.fuzz.strangers import documents, fuzz, named

GOOD: dict[str, Any] = {
    "schema": "numprune/canary/1",
    "texts": [{"text": "a", "tokens": [1]}],
    "prompts": [
        {
            "tokens": [1, 2],
            "logprobs": [-0.5],
            "greedy": [3] * 32,
            "greedy_logprobs": [-1.0] * 32,
            "margins": [0.5] * 32,
        }
    ],
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("canary") / canary.REFERENCE


@fuzz
@given(documents(GOOD))
@example(b"[" * 100_000)
def test_a_reference_is_read_or_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    found = named(canary.read, path)
    if not isinstance(found, NumpruneError):
        assert found.length >= canary.MINIMUM_STEPS
        found.write(path)
        assert canary.read(path) == found


def test_no_size_is_read_that_no_reference_has(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)
    assert "exceeds the" in str(named(canary.read, path))
