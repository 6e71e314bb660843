"""The parent's side of a worker process: start it, send requests, report how it died, and never leave it running."""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numprune.errors
from numprune.errors import NumpruneError

_STDERR_LINES = 8
_STDERR_BYTES = 8192
_CLOSING_S = 30.0  # takes milliseconds, but a busy machine may delay them
_ERRORS = {name: kind for name, kind in vars(numprune.errors).items() if isinstance(kind, type)}


class WorkerError(NumpruneError):
    """A worker ended, hung or sent an invalid response; the message has its last lines of stderr."""


class Worker:
    """A running worker. `name` identifies it in messages; `timeout_s` limits each response."""

    def __init__(self, name: str, process: "subprocess.Popen[bytes]", stderr: IO[bytes], timeout_s: float) -> None:
        if process.stdin is None or process.stdout is None:
            raise ValueError("a worker communicates over stdin and stdout: both must be pipes")
        self.name = name
        self.pid = process.pid
        self._process = process
        self._stdin = process.stdin
        self._stdout = process.stdout
        self._stderr = stderr
        self._timeout_s = timeout_s
        self._received = b""
        self._pending = ""  # the operation awaiting a response

    def ask(self, operation: str, **arguments: Any) -> Any:
        """Send a request and wait for the response. Raises what the worker raised, or WorkerError."""
        self.send(operation, **arguments)
        return self.receive()

    def send(self, operation: str, **arguments: Any) -> None:
        """Send a request; its response must be received before the next request."""
        if self._pending:
            raise RuntimeError(f"{self.name}: {self._pending!r} has not been answered yet")
        self._pending = operation
        try:
            self._stdin.write(json.dumps({"operation": operation, **arguments}).encode() + b"\n")
            self._stdin.flush()
        except BrokenPipeError:
            raise self._failure() from None

    def receive(self, timeout_s: float | None = None) -> Any:
        """The response to the last request, within `timeout_s` or the worker's own limit. Raises as `ask`."""
        line = self._read_line(self._timeout_s if timeout_s is None else timeout_s)
        try:
            answer = json.loads(line)
        except ValueError:
            raise self._failure(f"answered {line[:200]!r}, which is not JSON") from None
        self._pending = ""
        if "error" in answer:
            raise _ERRORS.get(answer["error"]["kind"], NumpruneError)(f"{self.name}: {answer['error']['message']}")
        return answer["ok"]

    def close(self) -> None:
        """End the process: by closing its stdin if idle, by force if busy or unresponsive."""
        if self._pending:
            self._process.kill()
        with suppress(BrokenPipeError):  # it died with an unread request: the pipe is closed anyway
            self._stdin.close()
        self._wait()
        self._stdout.close()

    def _wait(self) -> int:
        """The exit status of a process that should end by itself."""
        try:
            return self._process.wait(_CLOSING_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def _read_line(self, timeout_s: float) -> bytes:
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._received:
            ready, _, _ = select.select([self._stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise self._failure(f"did not respond within {timeout_s:g} s")
            chunk = os.read(self._stdout.fileno(), 1 << 16)
            if not chunk:
                raise self._failure()
            self._received += chunk
        line, self._received = self._received.split(b"\n", 1)
        return line

    def _failure(self, what: str = "") -> WorkerError:
        """Kill the process if it is still alive, and describe what happened."""
        if not what:  # its stdout has closed: it is about to end
            status = self._wait()
            what = f"ended with exit status {status}" if status >= 0 else f"was ended by {_signal_name(-status)}"
        self._process.kill()
        size = self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, size - _STDERR_BYTES))
        last = self._stderr.read().decode(errors="replace").strip().splitlines()[-_STDERR_LINES:]
        said = "its last lines: " + " | ".join(last) if last else "it left no message"
        return WorkerError(f"{self.name}: the benchmark worker {what} in {self._pending!r}; {said}")


@contextmanager
def start_worker(
    name: str, timeout_s: float, command: Sequence[str | Path] = (), env: Mapping[str, str] | None = None
) -> Iterator[Worker]:
    """Start a worker process; it has ended when the block exits, for whatever reason.

    Without a `command`, it is `numprune.serving.benchmark.worker`; `env` is its whole environment. A `command` gets a
    session of its own, as servers do: Linux divides CPU time among sessions, and it might get less in ours.
    """
    # Its stderr goes to a file, because an unread pipe fills up.
    with tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(
            # -P: no file in the current folder may stand in for a module.
            command or [sys.executable, "-P", "-m", "numprune.serving.benchmark.worker", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=env,
            start_new_session=bool(command),
        )
        worker = Worker(name, process, stderr, timeout_s)
        try:
            yield worker
        finally:
            worker.close()


def _signal_name(number: int) -> str:
    name = signal.Signals(number).name
    return f"{name} (usually out of memory, or killed manually)" if name == "SIGKILL" else name
