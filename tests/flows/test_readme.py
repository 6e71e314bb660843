"""The front page: its recipe, commands and Python lines, on a small model instead of a user's."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from numprune.flows import summary
from numprune.flows.cli import COMMANDS as MODULES
from numprune.flows.cli import serve
from numprune.flows.cli.parser import build, parse
from tests.conftest import build_tiny, write_checkpoint
from tests.flows.conftest import Answered
from tests.flows.test_summary import summarized

Command = Callable[..., Answered]

README = (Path(__file__).resolve().parent.parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
(RECIPE,) = [text for language, text in BLOCKS if language == "toml"]
(PYTHON,) = [text for language, text in BLOCKS if language == "python"]
LINES = [line.partition("#")[0] for _, text in BLOCKS for line in text.splitlines()]
(OUTPUTS,) = [text for language, text in BLOCKS if language == "text"]
# The command of each output, and its lines, which end in "…" where they are shortened.
_, *SHOWN = OUTPUTS.split("$ numprune ")
PLANNED, SUMMARY, READY = ([line.rstrip("…").rstrip(", ") for line in text.splitlines()[1:]] for text in SHOWN)
COMMANDS = [line.split()[1:] for line in LINES if line.startswith("numprune ")]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: `models/my-llama`, `text`, and the README's recipe as `my.toml`."""
    folder = tmp_path_factory.mktemp("project")
    write_checkpoint(build_tiny("llama", max_position_embeddings=1024), folder / "models" / "my-llama")
    (folder / "text").mkdir()
    for name, count in (("train", 600), ("heldout", 24)):
        lines = [json.dumps({"text": f"{name} {i}: {7 * i} sheep jump over the moon. " * 4}) for i in range(count)]
        (folder / "text" / f"{name}.jsonl").write_text("\n".join(lines))
    (folder / "my.toml").write_text(RECIPE)
    return folder


def test_every_shown_command_parses() -> None:
    assert [words[0] for words in COMMANDS] == ["plan", "optimize", "registry", "serve"]
    for words in COMMANDS:
        parse(build(MODULES), words)


@pytest.mark.slow
def test_plan_prints_what_the_readme_shows(numprune: Command, tmp_path: Path) -> None:
    planned = numprune("plan", "--workspace", str(tmp_path))
    assert planned.code == 0, planned.err
    shown = [line for line in PLANNED if not line.startswith("  calibration")]
    assert len(shown) == 5
    assert [line for line in shown if line not in planned.out] == []  # texts are of the interpreter's version


def form(text: str) -> str:
    """The text without what differs between models: figures with signs and units, names, runtimes."""
    text = re.sub(
        r"[+-]?\d[\d.,]*(?<![.,])", "0", text.replace("numprune-embedded", "NAME").replace("my-model", "NAME")
    )
    text = re.sub(r"ONNX Runtime|vLLM", "RUNTIME", re.sub(r"(onnxruntime|torch|vllm):", "RUNTIME:", text))
    return re.sub(r"0 [KMG]?i?B\b", "0 B", text)


def test_the_summary_of_a_run_says_what_is_shown(tmp_path: Path) -> None:
    text = form(summary.text(summarized(tmp_path, 0.25, noise=0.5)))  # as noisy as the machine of the shown run
    assert len(SUMMARY) == 6
    assert [line for line in SUMMARY if form(line) not in text] == []


def test_serve_says_what_is_shown() -> None:
    assert [serve.ready("numprune-embedded/1", "http://127.0.0.1:8000", "numprune-embedded")] == READY


@pytest.mark.slow
def test_the_commands_release_a_model(numprune: Command, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    plan, optimize, promote, _ = COMMANDS
    planned = numprune(*plan)
    assert planned.code == 0, planned.err
    for _ in range(3):
        answered = numprune(*optimize, "--json")
        if answered.code != 4:
            break
    else:
        pytest.skip(f"nothing can be measured on this machine now: {answered.json['reasons']}")
    assert answered.code in (0, 2, 3), answered.err  # the verdict on random weights is not the README's concern
    measured = form(summary.text(answered.json))
    assert [line for line in SUMMARY if line.split()[0] in ("sizes", "speed") and form(line) not in measured] == []
    if answered.code == 0:
        assert numprune(*promote).code == 0


@pytest.mark.slow
def test_the_python_lines_run(project: Path, tmp_path: Path) -> None:
    for name in ("models", "text"):
        (tmp_path / name).symlink_to(project / name)
    done = subprocess.run([sys.executable, "-c", PYTHON], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Estimate(value=")
    assert (tmp_path / "pruned-onnx" / "model.onnx").is_file()
