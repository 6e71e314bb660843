import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import psutil
import pytest

from numprune.errors import ParityError
from numprune.flows import children
from numprune.flows.children import ChildDied, ChildFailed, call

# A process with a child that tells its process id and then sleeps.
SLEEPING = """
    import sys
    from numprune.flows import children
    children._PRELOADED.clear()
    code = "import os, time, pathlib; pathlib.Path(path).write_text(str(os.getpid())); time.sleep(600)"
    children.call(exec, code, {"path": sys.argv[1]})
"""


def triple(value: int) -> tuple[int, int]:
    return 3 * value, os.getpid()


def refuse() -> None:
    raise ParityError("row 3, token 7")


def divide() -> float:
    return 1 / 0


def test_the_value_is_returned_from_another_process() -> None:
    value, pid = call(triple, 14)
    assert value == 42
    assert pid != os.getpid()


def test_user_errors_are_reraised_unchanged() -> None:
    with pytest.raises(ParityError, match="row 3, token 7"):
        call(refuse)


def test_unexpected_exceptions_keep_their_traceback() -> None:
    with pytest.raises(ChildFailed, match=r"in divide[\s\S]*ZeroDivisionError"):
        call(divide)


def test_a_killed_child_is_reported_as_killed() -> None:
    with pytest.raises(ChildDied, match=r"SIGKILL.*out of memory"):
        call(signal.raise_signal, signal.SIGKILL)
    with pytest.raises(ChildDied, match="exit code 3"):
        call(os._exit, 3)


def test_a_child_s_stdout_goes_to_stderr() -> None:
    # The server of the processes was started with whatever stderr was then, so a fresh interpreter is asked.
    program = """
        from numprune.flows import children
        children._PRELOADED.clear()
        children.call(exec, "import os; print('from python', flush=True); os.system('echo from native')")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert "from python" in done.stderr
    assert "from native" in done.stderr


def test_a_child_ends_with_its_parent(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(SLEEPING), str(tmp_path / "pid")])
    child = psutil.Process(int(next(read_when_there(tmp_path / "pid"))))
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    child.wait(timeout=20)


def test_interrupting_the_wait_ends_the_child(tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", textwrap.dedent(SLEEPING), str(tmp_path / "pid")]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE)
    child = psutil.Process(int(next(read_when_there(tmp_path / "pid"))))
    process.send_signal(signal.SIGINT)
    child.wait(timeout=20)
    process.communicate(timeout=20)
    assert process.returncode == -signal.SIGINT


def read_when_there(path: Path) -> Iterator[str]:
    deadline = time.monotonic() + 60
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    yield path.read_text()


def test_children_ignore_ctrl_c() -> None:
    """A terminal sends it to the children, too: they ignore it from the beginning."""
    assert children.call(_blocked) & 1 << (signal.SIGINT - 1)


def _blocked() -> int:
    """The mask of blocked signals."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("SigBlk:")).split()[1], 16)


def test_calls_of_several_threads_can_be_ended_together() -> None:
    with ThreadPoolExecutor(3) as pool:
        sleeping = [pool.submit(call, time.sleep, 600) for _ in range(2)]
        assert pool.submit(call, triple, 14).result()[0] == 42
        while wait(sleeping, timeout=0.1).not_done:
            children.end_all()
        for one in sleeping:
            with pytest.raises(ChildDied, match="SIGKILL"):
                one.result()
    assert call(triple, 1)[0] == 3
