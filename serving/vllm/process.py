"""A long-lived process with children, a log file and a tag: started, watched, found again, stopped.

The tag is in the environment of the process and of all its children, so that leftovers are found even if their parent
is gone. It also names the folder of their temporary files, which is removed with them: vLLM leaves a socket in it for
each of its engines. The folder holds the tag, so that it is found even if all of them are gone.
"""

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from numprune.export import disk

TAG = "NUMPRUNE_TAG"  # in the environment
_SCRATCH = "numprune-"  # what the names of temporary folders begin with
_TAG_FILE = "numprune-tag"  # in each of them

_POLL_S = 0.1
GRACE_S = 30.0
_CHILDREN_S = 3.0  # they include Python's resource tracker, which removes shared memory after a crash
_TAIL_BYTES = 1 << 16
_TAIL_LINES = 6
_NOISE = re.compile(r"^(\([^)]*pid=\d+\) )*([A-Z]+ \d\d-\d\d \d\d:\d\d:\d\d( \[[^]]*\])? ?)?|\x1b\[[0-9;]*m")
_CAUSE = re.compile(r"^(\w+\.)*\w*(Error|Exception|Killed|Exit)\b(: |$)|^error: |: error: ")
_INHERITED_NOT = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")  # another environment's


@dataclass(frozen=True)
class Process:
    """A process started by this process or an earlier one; plain values that can be stored.

    Attributes:
        tag: in the environment of it and its children; tells whether a process with this id is still the same one.
        log: its stdout and stderr.
    """

    pid: int
    tag: str
    log: Path
    _child: "subprocess.Popen[bytes] | None" = field(default=None, repr=False, compare=False)
    _watcher: "subprocess.Popen[bytes] | None" = field(default=None, repr=False, compare=False)

    def is_alive(self) -> bool:
        if self._child is not None:
            return self._child.poll() is None
        try:
            found = psutil.Process(self.pid)
            return found.status() != psutil.STATUS_ZOMBIE and found.environ().get(TAG) == self.tag
        except (psutil.NoSuchProcess, psutil.AccessDenied):  # the id now belongs to another user's process
            return False

    def how_it_ended(self) -> str:
        """How it ended, in words; only for an ended process."""
        status = self._child.poll() if self._child is not None else None
        if status is None:
            return "ended"
        return f"ended with exit status {status}" if status >= 0 else f"was ended by {signal.Signals(-status).name}"

    def stop(self, grace_s: float = GRACE_S) -> None:
        """Send SIGTERM to the process and, after `grace_s` or once it has ended, SIGKILL to its remaining children."""
        if self.is_alive():
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)
            deadline = time.monotonic() + grace_s
            while self.is_alive() and time.monotonic() < deadline:
                time.sleep(_POLL_S)
        kill_tagged(self.tag, grace_s=_CHILDREN_S)
        if self._child is not None:
            self._child.wait()
        _unwatch(self._watcher)

    def last_words(self) -> str:
        """The end of the log in one line: the causes that it names, or its last lines."""
        if not self.log.exists():
            return "its log has been removed"
        with self.log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
        lines = [line for raw in text.splitlines() if (line := _NOISE.sub("", raw).strip())]
        causes = [line for line in dict.fromkeys(lines) if _CAUSE.search(line)]
        chosen = (causes or lines)[-_TAIL_LINES:]
        return f"its last lines: {' | '.join(chosen)}" if chosen else "it left no message"


def start(
    command: Sequence[str | Path], *, tag: str, log: Path, detached: bool, env: Mapping[str, str] | None = None
) -> Process:
    """Start `command` in a session of its own, with a temporary folder of its own.

    Raises DiskError; OSError if `command` cannot be run. Nothing of it is then left behind.

    Args:
        detached: it outlives this process; otherwise it ends with this process, however that ends.
        env: added to this process's environment.
    """
    inherited = {name: value for name, value in os.environ.items() if name not in _INHERITED_NOT}
    scratch = _scratch(tag)
    # SPT_NOENV: vLLM names its processes with setproctitle, which otherwise overwrites the environment in /proc.
    ours = {"PYTHONSAFEPATH": "1", "SPT_NOENV": "1", **(env or {}), "TMPDIR": str(scratch), TAG: tag}
    watcher = None if detached else _watch(tag)  # first, so that the command is watched from its start
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        scratch.mkdir(mode=0o700, exist_ok=True)
        (scratch / _TAG_FILE).write_text(tag)
        with log.open("ab") as output:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in the terminal must reach only us; we stop it in an orderly way
                env={**inherited, **ours},
            )
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        _unwatch(watcher)
        raise
    return Process(child.pid, tag, log, child, watcher)


def _watch(tag: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "numprune.serving.vllm.watch", str(os.getpid()), tag],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,  # it outlives this process, and readers of our output must not wait for it
        start_new_session=True,
    )


def _unwatch(watcher: "subprocess.Popen[bytes] | None") -> None:
    if watcher is not None:
        watcher.kill()
        watcher.wait()


def tagged(prefix: str) -> Iterator[tuple[psutil.Process, str]]:
    """All live processes whose tag starts with `prefix`, with their tags."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            tag = process.environ().get(TAG)
            if tag is not None and tag.startswith(prefix) and process.status() != psutil.STATUS_ZOMBIE:
                yield process, tag


def end_tagged(tag: str, grace_s: float) -> None:
    """Send SIGTERM to all processes with exactly this tag, and SIGKILL to the rest after `grace_s`."""
    for process, other in tagged(tag):
        if other == tag:
            with suppress(psutil.NoSuchProcess):
                process.terminate()
    kill_tagged(tag, grace_s)


def kill_tagged(tag: str, grace_s: float = 0.0) -> None:
    """Kill all processes with exactly this tag that do not end within `grace_s`, and wait until they are gone.

    Their temporary folder goes with them.
    """
    deadline = time.monotonic() + grace_s
    while found := [process for process, other in tagged(tag) if other == tag and process.pid != os.getpid()]:
        if time.monotonic() >= deadline:
            for process in found:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        time.sleep(_POLL_S)
    shutil.rmtree(_scratch(tag), ignore_errors=True)


def tags_left(prefix: str) -> Iterator[str]:
    """The tags that start with `prefix` of this user's temporary folders, their processes alive or not.

    Raises DiskError.
    """
    for folder in Path(disk.folder_for_sockets()).glob(f"{_SCRATCH}*"):
        with suppress(OSError, UnicodeDecodeError):
            if folder.stat().st_uid == os.getuid() and (tag := (folder / _TAG_FILE).read_text()).startswith(prefix):
                yield tag


def _scratch(tag: str) -> Path:
    """The temporary folder of the processes of a tag, short enough for sockets. Raises DiskError."""
    return Path(disk.folder_for_sockets(), f"{_SCRATCH}{hashlib.sha256(tag.encode()).hexdigest()[:12]}")
