from collections.abc import Iterator

import pytest

from tests.serving.releases import require_vllm
from tests.serving.vllm_plugin.engine import Engine


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    found = require_vllm()
    assert found.plugin is not None, f"{found.python}: numprune-vllm is not installed there; make env-vllm"
    started = Engine(found.python, tmp_path_factory.mktemp("engine"))
    yield started
    assert started.process.stdin is not None
    started.process.stdin.close()
    started.process.wait(60)
