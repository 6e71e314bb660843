"""Shared by the tests of faults: a short recipe, a finished workspace, and real faults."""

import io
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from numprune.export import manifest

# The least that every stage takes; a tiny model needs no more to be judged.
QUICK = ["benchmark.prompts=2", "benchmark.prompt_length=8", "benchmark.output_length=2", "evaluate.prompts=['Once']"]
STAGES = (  # in the order in which a run of the tests' recipe makes them
    "calibration",
    "heldout",
    "baseline",
    "attention",
    "prune",
    "export-vllm",
    "parity-vllm",
    "export-onnx",
    "parity-onnx",
    "reference-answers",
    "quality",
    "benchmark-onnxruntime",
    "report",
)
MEASURED = ("benchmark-onnxruntime", "report")  # never the same twice


def command(recipe: Path, workspace: Path, *overrides: str) -> list[str]:
    return ["optimize", str(recipe), "--workspace", str(workspace), "--json", "--set", *QUICK, *overrides]


def finish(recipe: Path, workspace: Path) -> dict[str, Any]:
    """Run the recipe to its release; skip where this machine is too busy for any measurement."""
    from numprune.flows.cli import main

    for _ in range(3):
        out = io.StringIO()
        with redirect_stdout(out):
            code = main(command(recipe, workspace))
        if code != 4:
            break
        for report in (workspace / "stages").glob("report-*"):  # a stage's folder shall be found by its name
            shutil.rmtree(report)
    else:
        pytest.skip(f"nothing can be measured on this machine now: {json.loads(out.getvalue())['reasons']}")
    assert code == 0
    found: dict[str, Any] = json.loads(out.getvalue())
    return found


def stage(workspace: Path, name: str) -> Path:
    """The folder of a stage; the first one if candidate and baseline have one each."""
    return sorted((workspace / "stages").glob(f"{name}-{'[0-9a-f]' * 16}"))[0]


def digests(workspace: Path) -> dict[str, str]:
    """Digests of every stage whose content depends only on its inputs."""
    folders = [path for path in (workspace / "stages").glob("[a-z]*") if not path.name.startswith(MEASURED)]
    return {path.name: manifest.verify(path).digest for path in folders}


def flip_a_bit(path: Path) -> None:
    """Flip a bit in the middle of a file."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def wait_until(happened: Callable[[], Any], seconds: float = 300.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := happened()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


# --- a process that stops where it is told to -----------------------------------------------------

# Imported by every interpreter that has its folder on PYTHONPATH. The product knows nothing of it: an audit hook sees
# which file is opened and what is renamed, and the process stands still there, until it is killed or let go.
_STOPPING = """
import os, sys, time

_CONTROL = os.environ["FAULTS_CONTROL"]


def _stop(event, args):
    if event == "open":
        path, point = str(args[0]), "write"
        if not path.endswith(("/content/result.json", "/content/recipe.toml")):
            return
        name = path.split("/")[-3].removeprefix(".")
    elif event == "os.rename":
        path, point = str(args[1]), "rename"
        if "/stages/" not in path and "/releases/" not in path or "/content" in path:
            return
        name = os.path.basename(path)
    elif event == "os.remove":
        path, point = str(args[0]), "remove"
        if "/.training-" not in path:
            return
        name = path.split("/")[-2].removeprefix(".")
    else:
        return
    try:
        with open(_CONTROL + "/at") as file:
            at = file.read()
    except FileNotFoundError:
        return
    wanted, where = at.split()
    if point == where and name.startswith(wanted + "-"):
        with open(_CONTROL + "/pid.partial", "w") as file:
            file.write(str(os.getpid()))
        os.replace(_CONTROL + "/pid.partial", _CONTROL + "/pid")
        while not os.path.exists(_CONTROL + "/go"):
            time.sleep(0.05)


sys.addaudithook(_stop)
"""

_DRIVER = """
import json, sys
from numprune.flows.cli import main

for line in iter(sys.stdin.readline, ""):
    print(json.dumps({"code": main(json.loads(line))}), flush=True)
"""


@dataclass(frozen=True)
class Driver:
    """A process that runs one command line after another and can be paused inside a stage."""

    process: "subprocess.Popen[str]"
    control: Path

    def run_until(self, stage: str, point: str, argv: list[str]) -> int:
        """Begin a command line; return the id of the process that is paused in `stage`.

        Args:
            point: "write": all is computed, and its result about to be written; "rename": all is written, and about to
                get its name; "remove", in "training": it has saved its state twice.
        """
        for _ in range(3):
            for name in ("pid", "go"):
                (self.control / name).unlink(missing_ok=True)
            (self.control / "at").write_text(f"{stage} {point}")
            self.begin(argv)
            wait_until(lambda: self._stopped() or select.select([self.process.stdout], [], [], 0)[0])
            (self.control / "at").unlink()
            if pid := self._stopped():
                return pid
            code, _ = self.answer()
            assert code == 4, self.said()  # the machine was too busy for the run to come so far
        pytest.skip("nothing can be measured on this machine now")

    def _stopped(self) -> int:
        pid = self.control / "pid"
        return int(pid.read_text()) if pid.exists() else 0

    def let_go(self) -> None:
        """Resume the paused process."""
        (self.control / "go").touch()

    def begin(self, argv: list[str]) -> None:
        assert self.process.stdin is not None
        print(json.dumps(argv), file=self.process.stdin, flush=True)

    def answer(self) -> tuple[int, Any]:
        """The exit code and output of the command line that was begun."""
        assert self.process.stdout is not None
        lines: list[str] = []
        for line in self.process.stdout:
            if line.startswith('{"code":'):
                return int(json.loads(line)["code"]), json.loads("".join(lines) or "null")
            lines.append(line)
        raise AssertionError(f"the driver ended: {self.said()}")

    def said(self) -> str:
        return (self.control / "stderr").read_text()


def kill_in(folder: Path, stage: str, point: str, argv: list[str]) -> None:
    """Run a command line until `point` in `stage`, as of `Driver.run_until`, and kill that stage's process."""
    with driving(folder) as driver:
        os.kill(driver.run_until(stage, point, argv), signal.SIGKILL)
        code, _ = driver.answer()
        assert code == 1
        assert "its process was ended by SIGKILL" in driver.said()


@contextmanager
def driving(folder: Path) -> Iterator[Driver]:
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(_STOPPING)
    environment = {**os.environ, "FAULTS_CONTROL": str(folder), "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])}
    with (folder / "stderr").open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-c", _DRIVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=environment,
        )
    try:
        yield Driver(process, folder)
    finally:
        process.kill()
        process.communicate()
