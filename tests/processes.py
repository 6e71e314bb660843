"""Ends everything that tests started, however they end: `python processes.py PARENT MARK FOLDER`.

Every process that a test starts inherits a mark in its environment, those of xdist's workers and of servers that are
meant to outlive a command too. What they leave in FOLDER, their temporary one, is removed with them; pytest keeps its
own folders of the last runs where it always does.
"""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

_MARK = "NUMPRUNE_TESTS"
_POLL_S = 0.3
_GRACE_S = 10.0


def pytest_configure() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as after Ctrl-C, tests leave their fixtures
    if _MARK in os.environ:
        return  # a worker of xdist, or a test that runs pytest: somebody waits already
    mark = secrets.token_hex(8)
    outside = Path(tempfile.gettempdir())
    folder = Path(tempfile.mkdtemp(prefix="numprune-tests-"))
    folder.chmod(0o755)  # some tests are several users
    subprocess.Popen(
        [sys.executable, __file__, str(os.getpid()), mark, folder],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.environ[_MARK] = mark
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(outside))
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(outside / f"torchinductor_{os.getuid()}"))


def main() -> None:
    parent, mark, folder = int(sys.argv[1]), *sys.argv[2:]
    while os.getppid() == parent:
        time.sleep(_POLL_S)
    deadline = time.monotonic() + _GRACE_S
    for process in _marked(mark):
        process.terminate()
    while left := list(_marked(mark)):
        if time.monotonic() > deadline:
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        time.sleep(_POLL_S)
    shutil.rmtree(folder, ignore_errors=True)


def _marked(mark: str) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(_MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                yield process


if __name__ == "__main__":
    main()
