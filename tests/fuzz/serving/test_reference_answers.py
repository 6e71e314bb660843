from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given

from numprune.errors import NumpruneError
from numprune.serving import reference_answers
from tests.fuzz.strangers import documents, fuzz, named

GOOD: dict[str, Any] = {
    "schema": "numprune/reference-answers/1",
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
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("release")


@fuzz
@given(documents(GOOD))
@example(b"[" * 100_000)
def test_a_reference_is_read_or_refused(release: Path, content: bytes) -> None:
    (release / reference_answers.FILE_NAME).write_bytes(content)
    found = named(reference_answers.read, release)
    if not isinstance(found, NumpruneError):
        assert found.length >= reference_answers.MINIMUM_STEPS
        found.write(release)
        assert reference_answers.read(release) == found


def test_an_oversized_reference_is_not_read(release: Path) -> None:
    with (release / reference_answers.FILE_NAME).open("wb") as file:
        file.truncate(1 << 40)
    assert "exceeds the" in str(named(reference_answers.read, release))
