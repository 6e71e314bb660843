"""A real vLLM server of an embedding model, intact and damaged, and its check."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from numprune.errors import ParityError
from numprune.export import vllm
from numprune.flows.steps import reference_answers as making
from numprune.serving import loopback, reference_answers
from numprune.serving.reference_answers import PooledAnswers
from numprune.serving.rollout.backend import _load
from numprune.serving.vllm.server import Server, serving
from tests.conftest import build_tiny, write_checkpoint
from tests.serving.releases import SMALL, require_vllm

Json = dict[str, Any]

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """No file declares a pooling: it is the mean, which is not vLLM's own default."""
    folder = tmp_path_factory.mktemp("embedding")
    model = build_tiny("bert", task="embedding", num_attention_heads=2, head_dim=32)
    vllm.export(write_checkpoint(model, folder / "base"), folder / "vllm")
    return folder / "vllm"


@pytest.fixture(scope="module")
def reference(exported: Path) -> PooledAnswers:
    made = making.answers_of(exported)
    assert isinstance(made, PooledAnswers)
    return made


@pytest.fixture(scope="module")
def running(exported: Path) -> Iterator[Server]:
    with serving(require_vllm(), exported, name="embedder", dtype="float32", options=SMALL) as server:
        yield server


def test_the_server_returns_the_checkpoint_s_embeddings(running: Server, reference: PooledAnswers) -> None:
    found = reference_answers.check(running.url, reference, "float32")
    assert found["worst"]["error"] < found["tolerance"]
    assert (found["texts"], found["positions"]) == (4, 4 * 64)
    assert reference_answers.told(found).startswith("largest difference over 256 numbers ")


def first_entry(data: Json) -> str:
    data["inputs"][1]["values"][0] += 0.01
    return r"text 1, entry 0: the server gives .* differs by 0\.01"


def other_model(data: Json) -> str:
    data["inputs"][0]["values"].append(0.0)
    return "text 0: the server gives 64 numbers, the reference 65; it serves another model"


def other_tokenizer(data: Json) -> str:
    data["texts"][0]["tokens"][0] += 1
    return "the server's tokenizer reads"


@pytest.mark.parametrize("spoil", [first_entry, other_model, other_tokenizer])
def test_every_difference_is_named(running: Server, reference: PooledAnswers, spoil: Callable[[Json], str]) -> None:
    data = reference.model_dump(by_alias=True)
    said = spoil(data)
    with pytest.raises(ParityError, match=said):
        reference_answers.check(running.url, PooledAnswers.model_validate(data), "float32")


def test_a_rollout_sends_embedding_requests_as_load(running: Server, reference: PooledAnswers) -> None:
    _load(running, reference)
    metrics = loopback.get(f"{running.url}/metrics", timeout=30.0).text
    assert "vllm:request_success_total" in metrics
