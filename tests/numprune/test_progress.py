"""Progress without a terminal."""

import logging
import subprocess
import sys
import time
from pathlib import Path

import pytest

from numprune.progress import Progress, progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, in a list for the test to change."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_a_line_every_30_seconds(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "numprune")
    for item in progress(range(100), "calibrate", "layer"):
        clock[0] += 13.0
        assert item == round(clock[0] / 13) - 1
    assert caplog.messages[:2] == [
        "calibrate: 3 of 100 layers, about 21 min left",
        "calibrate: 6 of 100 layers, about 20 min left",
    ]
    assert len(caplog.messages) == 33  # of 1,300 s; the last one is not told when all is done


def test_short_loops_log_nothing(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "numprune")
    with Progress(4, "evaluate", "window") as bar:
        for _ in range(4):
            clock[0] += 7.0
            bar.update()
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("seconds_each", "left"), [(31.0, "31 s"), (360.0, "6 min"), (7200.0, "2 h 0 min"), (9000.0, "2 h 30 min")]
)
def test_time_left(clock: list[float], caplog: pytest.LogCaptureFixture, seconds_each: float, left: str) -> None:
    caplog.set_level(logging.INFO, "numprune")
    with Progress(2, "prune", "layer") as bar:
        clock[0] += seconds_each
        bar.update()
    assert caplog.messages == [f"prune: 1 of 2 layers, about {left} left"]


def test_a_loop_of_unknown_length_tells_what_is_done(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "numprune")
    with Progress(None, "search", "generation") as bar:
        for number in range(5):
            clock[0] += 16.0
            bar.update(note=f"divergence {number}")
    assert caplog.messages == ["search: 2 generations, divergence 1", "search: 4 generations, divergence 3"]


def test_a_progress_bar_needs_no_system_semaphore(tmp_path: Path) -> None:
    """A child that is ended would leave it behind, and Python would say so after our own message."""
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing, os\n"
        "from numprune.progress import Progress\n"
        "def work():\n"
        "    Progress(1, 'work', 'step').update()\n"
        "    os._exit(1)\n"
        "if __name__ == '__main__':\n"
        "    child = multiprocessing.get_context('forkserver').Process(target=work)\n"
        "    child.start()\n"
        "    child.join()\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
