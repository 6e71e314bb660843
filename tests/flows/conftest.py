"""A tiny model with its text and a recipe, and a command line that returns (exit code, stdout, stderr)."""

import atexit
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from numprune.flows.stages import Stage
from tests.conftest import build_tiny, write_checkpoint
from tests.flows.collector import ENDPOINT, Collector

# Before Prefect is imported: its database is nobody's but these tests'.
os.environ["PREFECT_HOME"] = tempfile.mkdtemp(prefix="numprune-prefect-")
atexit.register(shutil.rmtree, os.environ["PREFECT_HOME"], ignore_errors=True)
os.environ["PREFECT_LOGGING_LEVEL"] = "CRITICAL"  # as the command line sets it

RECIPE = """
[model]
path = "base"
[data]
calibration = "train.txt"
heldout = "heldout.jsonl"
samples = 12
sequence_length = 64
[prune]
ratio = 0.25
[benchmark]
runtimes = ["onnxruntime"]
prompts = 4
prompt_length = 16
output_length = 32
repeats = 4
[[gates]]
metric = "quality.loss_delta"
bound = "ci95_upper"
max = 20.0
[[gates]]
metric = "sizes.parameters.ratio"
bound = "point"
max = 0.95
[registry]
name = "tiny"
"""


@pytest.fixture(scope="session")
def tiny(request: pytest.FixtureRequest) -> Path:
    """A folder with `base` (a checkpoint), `train.txt`, `heldout.jsonl` and `recipe.toml`; not to be written to."""
    return shared(request, "tiny", lambda folder: write_inputs(folder, build_tiny(), RECIPE))


def shared(request: pytest.FixtureRequest, name: str, make: Callable[[Path], object]) -> Path:
    """A folder shared by all processes of a test run, made by the first that needs it."""
    root: Path = request.getfixturevalue("tmp_path_factory").getbasetemp()
    if hasattr(request.config, "workerinput"):  # a process of xdist has its folder in that of the run
        root = root.parent
    folder, made = root / name, root / f"{name}.made"
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            made.touch()
    return folder


def write_inputs(folder: Path, model: PreTrainedModel, recipe: str) -> Path:
    """Write the model as `base`, its text and the recipe into the folder."""
    write_checkpoint(model, folder / "base")
    (folder / "train.txt").write_text("The quick brown fox jumps over the lazy dog. " * 100)
    documents = [f"Document {i} says that {7 * i} sheep jump over the moon." for i in range(24)]
    (folder / "heldout.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in documents))
    (folder / "recipe.toml").write_text(recipe)
    return folder


@pytest.fixture(scope="session")
def finished(tiny: Path, request: pytest.FixtureRequest) -> Path:
    """A workspace after an undisturbed run of the recipe; not to be written to."""
    from tests.flows.faults import finish

    def make(folder: Path) -> None:
        assert finish(tiny / "recipe.toml", folder / "w")["version"] == "tiny/1"

    return shared(request, "finished", make) / "w"


@pytest.fixture
def workspace(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished one."""
    return Path(shutil.copytree(finished, tmp_path / "w"))


def work(option: int = 1) -> Stage[dict[str, int]]:
    """A stage with an empty result."""
    return Stage.of("work", "serving", _no_work, option=option)


def _no_work(out: Path, *, option: int) -> dict[str, int]:
    return {}


@dataclass(frozen=True)
class Answered:
    code: int
    out: str
    err: str

    @property
    def is_error(self) -> bool:
        """Exit code 1, and nothing on stdout except, with --json, the error that is also on stderr."""
        if not self.out:
            return self.code == 1
        return self.code == 1 and set(self.json) == {"error", "exit_code"} and self.json["error"] in self.err

    @property
    def json(self) -> dict[str, Any]:
        parsed: dict[str, Any] = json.loads(self.out)
        return parsed


@pytest.fixture
def numprune(capfd: pytest.CaptureFixture[str]) -> Callable[..., Answered]:
    """Run a command line in this process."""
    from numprune.flows.cli import main

    def run(*argv: object) -> Answered:
        capfd.readouterr()
        code = main([str(argument) for argument in argv])
        return Answered(code, *capfd.readouterr())

    return run


def shell(*argv: object) -> Answered:
    """Run a command line in a process of its own, as scripts do."""
    command = [sys.executable, "-m", "numprune.flows.cli", *map(str, argv)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    return Answered(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """The endpoint that receives spans."""
    from numprune.flows import tracing

    found = Collector()
    monkeypatch.setenv(ENDPOINT, found.url)
    monkeypatch.setattr(tracing, "_CLOSING_S", 60.0)  # however busy the machine is
    yield found
    found.close()
