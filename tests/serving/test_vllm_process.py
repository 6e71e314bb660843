"""Long-lived processes leave nothing behind, whichever of them dies, and how."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from numprune.serving.vllm import process
from numprune.serving.vllm.process import Process, kill_tagged, tagged

TAG = f"test-{os.getpid()}:"

# A parent that ends on SIGTERM, and leaves behind a child that does not.
FAMILY = """
import signal, subprocess, sys, time
child = "import signal, time; signal.signal(15, signal.SIG_IGN); print('child', flush=True); time.sleep(300)"
subprocess.Popen([sys.executable, "-c", child])
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
print("parent", flush=True)
time.sleep(300)
"""


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    yield
    for _, tag in list(tagged(TAG)):
        kill_tagged(tag)


def start(tmp_path: Path, script: str, *, detached: bool = False, tag: str = "a") -> Process:
    return process.start([sys.executable, "-c", script], tag=TAG + tag, log=tmp_path / f"{tag}.log", detached=detached)


def wait(condition: Callable[[], bool], what: str, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def alive(tag: str = "a") -> int:
    return sum(other == TAG + tag for _, other in tagged(TAG))


def said(running: Process, *words: str) -> bool:
    return set(words) <= set(running.log.read_text().split())


def test_stopping_kills_unresponsive_children(tmp_path: Path) -> None:
    running = start(tmp_path, FAMILY)
    wait(lambda: said(running, "parent", "child"), "the family is complete")
    assert running.is_alive()
    assert alive() == 2
    running.stop()
    assert not running.is_alive()
    assert alive() == 0


def test_a_process_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    running = start(
        tmp_path, "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(300)"
    )
    wait(lambda: said(running, "up"), "it ignores")
    running.stop(grace_s=0.5)
    assert running.how_it_ended() == "was ended by SIGKILL"


def test_stopping_leaves_other_tags_alone(tmp_path: Path) -> None:
    first, second = (start(tmp_path, "import time; time.sleep(300)", tag=tag) for tag in ("a", "ab"))
    first.stop()
    assert second.is_alive()
    second.stop()


def test_it_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    script = f"""
import sys, time
from pathlib import Path
from numprune.serving.vllm import process
command = [sys.executable, "-c", "import time; time.sleep(300)"]
process.start(command, tag={TAG + "a"!r}, log=Path({str(tmp_path)!r}) / "log", detached={{detached}})
print("started", flush=True)
time.sleep(300)
"""
    for detached, left in ((False, 0), (True, 1)):
        starter = subprocess.Popen([sys.executable, "-c", script.format(detached=detached)], stdout=subprocess.PIPE)
        assert starter.stdout is not None
        assert starter.stdout.readline() == b"started\n"
        wait(lambda: alive() == 1, "it runs")
        starter.send_signal(signal.SIGKILL)
        starter.wait()
        starter.stdout.close()
        if left:
            time.sleep(0.5)
        wait(lambda left=left: alive() == left, f"detached={detached}")
        if not left:
            wait(lambda: not process._scratch(TAG + "a").exists(), "its temporary folder is gone")


def test_what_it_leaves_in_its_temporary_folder_goes_with_it(tmp_path: Path) -> None:
    running = start(tmp_path, "import tempfile, time; print(tempfile.mkstemp()[1], flush=True); time.sleep(300)")
    wait(lambda: running.log.read_text().endswith("\n"), "it runs")
    left = Path(running.log.read_text().strip())
    os.kill(running.pid, signal.SIGKILL)
    wait(lambda: not running.is_alive(), "it ends")
    assert left.exists()
    running.stop()
    assert not left.parent.exists()


@pytest.mark.parametrize("detached", [False, True])
def test_a_command_that_cannot_be_run_leaves_nothing(tmp_path: Path, detached: bool) -> None:
    before = psutil.Process().children()
    with pytest.raises(FileNotFoundError, match="/no/such/python"):
        process.start(["/no/such/python"], tag=TAG + "a", log=tmp_path / "log", detached=detached)
    assert not process._scratch(TAG + "a").exists()
    assert psutil.Process().children() == before


def test_a_recorded_process_is_found_again_and_not_confused(tmp_path: Path) -> None:
    running = start(tmp_path, "import time; time.sleep(300)", detached=True)
    again = Process(running.pid, running.tag, running.log)
    wait(again.is_alive, "the launcher has become the command")
    assert not Process(os.getpid(), running.tag, running.log).is_alive()  # the number is another process's now
    assert not Process(running.pid, TAG + "other", running.log).is_alive()
    again.stop()
    assert not running.is_alive()
    assert alive() == 0


def test_exit_status_and_last_lines_are_reported(tmp_path: Path) -> None:
    script = """
import sys
print("INFO 11-21 05:32:47 [core.py:12] loading")
print("(EngineCore pid=12) ERROR 11-21 05:32:47 [core.py:99] ValueError: No room for the cache")
print("(APIServer pid=11) RuntimeError: Engine core initialization failed.")
print("bye")
sys.exit(3)
"""
    running = start(tmp_path, script)
    wait(lambda: not running.is_alive(), "it ends")
    assert running.how_it_ended() == "ended with exit status 3"
    assert running.last_words() == (
        "its last lines: ValueError: No room for the cache | RuntimeError: Engine core initialization failed."
    )


def test_without_a_cause_the_last_lines_are_reported(tmp_path: Path) -> None:
    running = start(tmp_path, "print(*range(20), sep='\\n')")
    wait(lambda: not running.is_alive(), "it ends")
    assert running.last_words() == "its last lines: 14 | 15 | 16 | 17 | 18 | 19"


def test_a_silent_death_is_reported(tmp_path: Path) -> None:
    running = start(tmp_path, "import os; os.kill(os.getpid(), 9)")
    wait(lambda: not running.is_alive(), "it ends")
    assert (running.how_it_ended(), running.last_words()) == ("was ended by SIGKILL", "it left no message")


def test_python_variables_are_not_inherited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    monkeypatch.setenv("KEPT", "yes")
    running = start(tmp_path, "import os; print(os.environ.get('PYTHONPATH'), os.environ['KEPT'])")
    wait(lambda: not running.is_alive(), "it ends")
    assert running.log.read_text() == "None yes\n"
