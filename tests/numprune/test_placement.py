"""Models spread over two devices.

torch keeps a second device for the rest of the process, and gradients only reach devices that it knew before the first
gradient. So the tests of spread_models.py have a process of their own.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from numprune.errors import InputError
from numprune.placement import is_spread, placed
from tests.conftest import build_tiny

TESTS = Path(__file__).with_name("spread_models.py")


@pytest.mark.slow
def test_spread_models() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", str(TESTS)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, env=environment, cwd=TESTS.parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def test_what_cannot_be_placed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_tiny(hidden_size=32)
    first, second = torch.device("cpu"), torch.device("meta")
    size = sum(parameter.nbytes for parameter in model.parameters())
    with pytest.raises(InputError, match=r"2 GPUs have .* --stream .*prune\.stream"):
        placed(model, {first: size // 4, second: size // 4})
    with pytest.raises(InputError, match=r"meta has .*\(processes of torchrun have one each"):
        placed(model, {second: size // 2})
    with pytest.raises(InputError, match=r"no place for .* beside the rest"):
        placed(model, {first: size + size // 8, second: 1}, models=2)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"too little for the model of .* accelerate: pip install .numprune\[learn\]"):
        placed(model, {first: size // 2, second: size})
    assert placed(model, {first: size + size // 8, second: size}, models=2) is model
    assert not is_spread(model)
