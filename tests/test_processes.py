"""An interrupted run of the tests leaves nothing behind."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest

from tests import processes
from tests.flows.faults import wait_until

ROOT = Path(__file__).parents[1]

# A server as tests start them, in a session of its own; and a fixture that writes when it is left.
TEST = """
    import os, subprocess, sys, tempfile, time
    from pathlib import Path

    import pytest

    FOLDER = Path(__file__).parent


    @pytest.fixture
    def server():
        started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
        tempfile.mkstemp()
        (FOLDER / "server.partial").write_text(str(started.pid))
        (FOLDER / "server.partial").rename(FOLDER / "server")
        yield
        (FOLDER / "left").touch()


    def test(server):
        time.sleep(600)
"""


@pytest.mark.parametrize(
    ("workers", "sent"),
    [
        ([], signal.SIGTERM),
        (["-n", "1"], signal.SIGINT),
        (["-n", "1"], signal.SIGTERM),
        (["-n", "1"], signal.SIGKILL),
    ],
)
@pytest.mark.slow
def test_servers_end_with_an_interrupted_run(tmp_path: Path, workers: list[str], sent: signal.Signals) -> None:
    (tmp_path / "test_it.py").write_text(textwrap.dedent(TEST))
    options = ["-q", "-p", "tests.processes", "-c", os.devnull, "--rootdir", str(tmp_path)]
    command = [sys.executable, "-m", "pytest", *options, *workers, str(tmp_path / "test_it.py")]
    (tmp_path / "temporary").mkdir()
    environment = {name: value for name, value in os.environ.items() if name != processes._MARK}
    environment["TMPDIR"] = str(tmp_path / "temporary")
    run = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        wait_until((tmp_path / "server").exists)
        family = [psutil.Process(int((tmp_path / "server").read_text())), *psutil.Process(run.pid).children()]
        assert list((tmp_path / "temporary").glob("numprune-tests-*/tmp*"))
        run.send_signal(sent)
        run.wait()
        _, alive = psutil.wait_procs(family, timeout=300)
        assert alive == []
        # xdist kills a worker some seconds after interrupting it, whether it has left its fixtures by then or not.
        assert (tmp_path / "left").exists() or workers
        wait_until(lambda: not list((tmp_path / "temporary").iterdir()))
    finally:
        run.kill()
