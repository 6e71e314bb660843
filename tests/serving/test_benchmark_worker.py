"""Worker processes: their answers, how they die, and that they never outlive their parent."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from numprune.errors import InputError
from numprune.serving.benchmark import WorkerError
from numprune.serving.benchmark.client import start_worker


def wait_until_gone(pid: int, seconds: float = 60.0) -> bool:
    """Whether the process ended; where nobody collects orphans, a zombie has."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.slow
def test_a_worker_loads_works_and_ends(tiny_checkpoint):
    folder = tiny_checkpoint()
    with start_worker("baseline", timeout_s=300) as worker:
        with pytest.raises(InputError, match=r"baseline: .*nowhere"):  # what it raises is raised here, and it lives on
            worker.ask("load", folder=str(folder / "nowhere"), runtime="torch", device="cpu", threads=1)
        opened = worker.ask("load", folder=str(folder), runtime="torch", device="cpu", threads=1)
        worker.ask("prepare", token_ids=[[1, 2, 3], [4, 5, 6], [7, 8, 9], [1, 1, 1]], batch_size=2, output_length=4)
        repeat = worker.ask("repeat")
        finished = worker.ask("finish")

    assert opened["vocabulary"] == 259
    assert opened["kv_bytes_per_token"] == 2 * 2 * 2 * 16 * 4  # keys and values, layers, KV heads, head size, float32
    assert opened["peak_bytes_load"] >= opened["resident_bytes_loaded"] > opened["weight_bytes"] > 0
    assert finished["peak_bytes_run"] > opened["weight_bytes"]
    assert len(repeat["batches"]) == 2
    for batch in repeat["batches"]:
        assert (batch["size"], batch["prompt_length"], batch["failed"], len(batch["itl_ms"])) == (2, 3, 0, 3)
        assert min(batch["ttft_ms"], *batch["itl_ms"]) > 0
    assert wait_until_gone(worker.pid, seconds=0.1)


@pytest.mark.slow
def test_a_killed_worker_is_reported(tiny_checkpoint):
    with start_worker("candidate", timeout_s=300) as worker:
        worker.ask("load", folder=str(tiny_checkpoint()), runtime="torch", device="cpu", threads=1)
        worker.ask("prepare", token_ids=[[1, 2, 3]] * 2000, batch_size=1, output_length=100)
        worker.send("repeat")
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(WorkerError, match=r"candidate: .*SIGKILL.*out of memory.*'repeat'"):
            worker.receive()


@pytest.mark.slow
def test_a_crash_reports_its_last_lines():
    message = r"exit status 1 in 'no such operation'; .*KeyError: 'no such operation'"
    with start_worker("candidate", timeout_s=300) as worker, pytest.raises(WorkerError, match=message):
        worker.ask("no such operation")


def test_an_unresponsive_worker_is_killed():
    with start_worker("candidate", timeout_s=0.01) as worker:
        with pytest.raises(WorkerError, match=r"did not respond within 0.01 s in 'finish'"):
            worker.ask("finish")
        assert wait_until_gone(worker.pid, seconds=10)


@pytest.mark.slow
def test_one_answer_may_take_longer_than_the_others():
    with start_worker("candidate", timeout_s=0.01) as worker:
        worker.send("decode_eagerly")
        with pytest.raises(WorkerError, match="exit status 1"):  # it answered: it has no model
            worker.receive(timeout_s=300)


def test_an_exception_in_the_parent_leaves_no_worker():
    def fail() -> None:
        with start_worker("candidate", timeout_s=300) as worker:
            pids.append(worker.pid)
            worker.send("finish")
            raise ZeroDivisionError

    pids: list[int] = []
    with pytest.raises(ZeroDivisionError):
        fail()
    assert wait_until_gone(pids[0], seconds=0.1)


PARENT = """
import sys, time
from numprune.serving.benchmark.client import start_worker
with start_worker("candidate", timeout_s=300) as worker:
    worker.ask("load", folder=sys.argv[1], runtime="torch", device="cpu", threads=1)
    worker.ask("prepare", token_ids=[[1, 2, 3]] * 2000, batch_size=1, output_length=100)
    worker.send("repeat")
    print(worker.pid, flush=True)
    time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a worker finishes its repeat first")
@pytest.mark.slow
def test_a_worker_that_computes_dies_with_its_killed_parent(tiny_checkpoint):
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tiny_checkpoint())], stdout=subprocess.PIPE)
    pid = int(parent.stdout.readline())
    assert psutil.Process(pid).is_running()
    parent.kill()
    parent.communicate()
    assert wait_until_gone(pid, seconds=20)


def test_an_orphan_ends_before_it_starts():
    """Its parent died between fork and prctl: here, the parent it is told of is not the one it has."""
    if sys.platform != "linux":
        pytest.skip("prctl")
    done = subprocess.run(
        [sys.executable, "-m", "numprune.serving.benchmark.worker", "1"], input=b"", capture_output=True, check=False
    )
    assert done.returncode == 1
    assert b"the parent is gone" in done.stderr


def test_stdout_carries_only_responses():
    script = (
        "import os; from numprune.serving.benchmark.worker import reserve_stdout; answers = reserve_stdout();"
        "print('chatter'); os.system('echo from a library'); answers.write('{}'); answers.close()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert json.loads(done.stdout) == {}
    assert b"chatter" in done.stderr
    assert b"from a library" in done.stderr
