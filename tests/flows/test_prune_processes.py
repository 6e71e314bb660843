"""numprune prune in two processes of torchrun."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from numprune.export import manifest
from numprune.flows.cli import main
from numprune.plans import PLAN_FILE
from tests.conftest import build_tiny, write_checkpoint

ASKED = {
    "residual-error": ["--compensation", "residual", "--allocation", "error"],
    "joint-uniform-streamed": ["--stream"],
    "oneshot": ["--compensation", "oneshot"],
}
PROGRAM = """
import json, os, signal, sys
from numprune.flows.cli import main
from numprune.moments import Moments

asked, fails = json.loads(sys.argv[1]), sys.argv[2] == "fails"
if fails and os.environ["RANK"] == "1":
    Moments.require_finite = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
for words in asked:
    if code := main(words):
        sys.exit(code)
"""


def words(folder: Path, out: str, *more: str) -> list[str]:
    text = ["--text", str(folder / "train.txt"), "--samples", "21", "--sequence-length", "16"]
    return ["prune", str(folder / "dense"), str(folder / out), "--ratio", "0.3", "--align", "4", *text, "--json", *more]


def launch(folder: Path, asked: list[list[str]], *, fails: bool = False) -> "subprocess.CompletedProcess[str]":
    (folder / "program.py").write_text(PROGRAM)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    if fails:
        launcher += ["--monitor-interval", "5"]  # before it ends the others, so that they can say why they end
    command = [sys.executable, *launcher, folder / "program.py", json.dumps(asked), "fails" if fails else "runs"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, env=environment)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    found = tmp_path_factory.mktemp("processes")
    write_checkpoint(build_tiny(hidden_size=32), found / "dense")
    (found / "train.txt").write_text("".join(f"{i} squared is {i * i}, halved {i / 2}.\n" for i in range(200)))
    return found


@pytest.mark.slow
def test_two_processes_prune_as_one(folder: Path, capsys) -> None:
    both = [words(folder, f"two-{name}", *more) for name, more in ASKED.items()]
    done = launch(folder, [*both, words(folder, "two.json", "--plan-only")])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"prunable_ratio_removed"') == len(ASKED) + 1  # one process answers
    assert done.stderr.count("calibration text") == len(ASKED) + 1  # and logs
    for name, more in ASKED.items():
        assert main(words(folder, f"one-{name}", *more)) == 0
        one, two = (folder / f"{count}-{name}" for count in ("one", "two"))
        manifest.verify(two)
        assert (two / PLAN_FILE).read_bytes() == (one / PLAN_FILE).read_bytes()
        theirs = load_file(two / "model.safetensors")
        for tensor, weight in load_file(one / "model.safetensors").items():
            assert float((weight - theirs[tensor]).abs().max()) < 1e-6, (name, tensor)
    assert main(words(folder, "one.json", "--plan-only")) == 0
    assert (folder / "two.json").read_bytes() == (folder / "one.json").read_bytes()
    capsys.readouterr()


@pytest.mark.slow
def test_a_killed_process_ends_the_other_and_leaves_nothing(folder: Path) -> None:
    before = sorted(path.name for path in folder.iterdir())
    done = launch(folder, [words(folder, "lost", "--stream")], fails=True)
    assert done.returncode != 0
    assert "process 0 of 2: another process has ended" in done.stderr
    assert json.loads(done.stdout)["exit_code"] == 1
    assert sorted({*before, "program.py"}) == sorted(path.name for path in folder.iterdir())


def test_commands_that_run_in_one_process_are_refused_under_a_launcher(monkeypatch, capsys) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["inspect", "nowhere"]) == 1
    assert (
        "a launcher started 2 processes, and only numprune prune and numprune recover share" in capsys.readouterr().err
    )


@pytest.mark.parametrize(("world", "rank", "objects"), [("2", "0", 1), ("2", "1", 0), ("1", "1", 1), (None, "1", 1)])
def test_of_several_processes_that_fail_one_prints_json(world, rank, objects, monkeypatch, capsys) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if world:
        monkeypatch.setenv("WORLD_SIZE", world)
    assert main(["prune", "nowhere", "out", "--ratio", "0.3", "--text", "none.txt", "--json"]) == 1
    told = capsys.readouterr()
    assert told.out.count('"exit_code": 1') == objects
    assert "error: " in told.err
