import os
from collections.abc import Iterator

import pytest

from numprune.errors import MissingRuntime
from numprune.serving.vllm import environment
from tests.serving.vllm_plugin.engine import Engine


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    try:
        found = environment.find()
    except MissingRuntime as error:
        if environment.VARIABLE in os.environ:
            raise
        pytest.skip(str(error))
    assert found.plugin is not None, f"{found.python}: numprune-vllm is not installed there; make env-vllm"
    started = Engine(found.python, tmp_path_factory.mktemp("engine"))
    yield started
    assert started.process.stdin is not None
    started.process.stdin.close()
    started.process.wait(60)
