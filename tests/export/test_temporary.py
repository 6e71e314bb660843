"""Folders are complete or absent: after kill -9, with two writers, and with concurrent sweeps."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from numprune.export import locks, manifest

CREATIONS = 100

CHILD = """
import sys, time
from pathlib import Path
from numprune.export import manifest

folder, text, wait = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
with manifest.creating(folder, kind="stage") as content:
    (content / "file").write_text(text)
    print("writing", flush=True)
    if wait == "forever":
        time.sleep(600)
    sys.stdin.readline()
print("created", flush=True)
"""


def child(folder: Path, text: str, wait: str = "line") -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder), text, wait], stdin=pipe, stdout=pipe, stderr=pipe, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    return process


def test_kill_9_leaves_no_folder_and_sweeping_removes_only_leftovers_of_dead_processes(tmp_path: Path) -> None:
    killed = child(tmp_path / "killed", "x", wait="forever")
    living = child(tmp_path / "living", "x")
    assert manifest.sweep(tmp_path) == []
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not (tmp_path / "killed").exists()

    removed = manifest.sweep(tmp_path)
    assert [path.name.split(".")[1] for path in removed] == ["killed"]
    living.communicate("\n")
    assert living.returncode == 0
    manifest.verify(tmp_path / "living")
    assert [path.name for path in tmp_path.iterdir()] == ["living"]
    with manifest.creating(tmp_path / "killed", kind="stage"):
        pass  # the name is free


def test_two_processes_creating_one_folder_give_one_complete_folder_and_one_clear_error(tmp_path: Path) -> None:
    children = [child(tmp_path / "out", text) for text in ("first", "second")]
    errors = [process.communicate("\n")[1] for process in children]
    codes = [process.returncode for process in children]
    assert codes == [0, 1]
    assert "InputError" in errors[1]
    assert "another process created it" in errors[1]
    manifest.verify(tmp_path / "out")
    assert (tmp_path / "out" / "file").read_text() == "first"
    assert list(tmp_path.glob(".*.partial")) == []


def test_sweeping_touches_nothing_else(tmp_path: Path) -> None:
    with manifest.creating(tmp_path / "artifact", kind="stage"):
        pass
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".notes.0123456789abcdef.partial").mkdir()
    (tmp_path / ".notes.0123456789abcdef.partial" / "mine").write_text("x")  # named so, but no work of `creating`
    (tmp_path / ".empty.0123456789abcdef.partial").mkdir()  # killed before it had a lock
    assert manifest.sweep(tmp_path) == [tmp_path / ".empty.0123456789abcdef.partial"]
    assert manifest.sweep(tmp_path / "nowhere") == []
    manifest.verify(tmp_path / "artifact")


@pytest.mark.parametrize("step", ["open_file", "acquire"])
def test_creation_survives_a_sweep_before_its_lock_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    real, swept = getattr(locks, step), []

    def after_a_sweep(*given: Any, **how: Any) -> Any:
        if not swept:
            swept.append([])  # the sweep opens and locks files, too
            swept[0] = manifest.sweep(tmp_path)
        return real(*given, **how)

    monkeypatch.setattr(locks, step, after_a_sweep)
    with manifest.creating(tmp_path / "artifact", kind="stage") as content:
        (content / "file").write_text("x")
    assert len(swept[0]) == 1
    manifest.verify(tmp_path / "artifact")
    assert list(tmp_path.glob(".*.partial")) == []


def test_creation_survives_concurrent_sweeps(tmp_path: Path) -> None:
    """A sweep may run between any two steps of `creating`; neither may fail or lose a finished folder."""
    script = (
        "import sys; from pathlib import Path; from numprune.export import manifest\n"
        "print('go', flush=True)\n"
        "while True: manifest.sweep(Path(sys.argv[1]))"
    )
    sweeper = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert sweeper.stdout is not None
        sweeper.stdout.readline()
        for index in range(CREATIONS):
            with manifest.creating(tmp_path / str(index), kind="stage") as content:
                (content / "file").write_text("x")
        assert sweeper.poll() is None
    finally:
        sweeper.kill()
        sweeper.communicate()
    assert list(tmp_path.glob(".*.partial")) == []
    for index in range(CREATIONS):
        manifest.verify(tmp_path / str(index))
