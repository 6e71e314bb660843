"""The Prefect server of a run: the one that is configured, or a temporary one that ends with this process."""

import atexit
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO

import httpx
import psutil

from numprune.errors import NumpruneError
from numprune.serving import loopback

_COMMAND = "prefect.server.api.server:create_app"
_STARTING_S = 120.0  # on a busy machine; it takes 4 s to make its database
_POLL_S = 0.1
_held: list[IO[bytes]] = []  # pipes that close when this process ends, however it ends


class ServerError(NumpruneError):
    """Prefect's server cannot be reached or started."""


def start() -> None:
    """Start a temporary server for this process, unless another server is configured; see that it answers.

    Raises ServerError.
    """
    from prefect.client.orchestration import get_client
    from prefect.settings import (
        PREFECT_API_URL,
        PREFECT_CLIENT_MAX_RETRIES,
        PREFECT_SERVER_EPHEMERAL_ENABLED,
        temporary_settings,
    )

    url = PREFECT_API_URL.value()
    if not url:
        if not PREFECT_SERVER_EPHEMERAL_ENABLED.value():
            name = PREFECT_SERVER_EPHEMERAL_ENABLED.name
            raise ServerError(f"{name} is false and no Prefect server is configured; unset it, or set PREFECT_API_URL")
        _start_temporary()
    try:
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}), get_client(sync_client=True) as client:
            client.read_flow_runs(limit=1)
    except Exception as error:  # Prefect's own, its HTTP client's
        said = (str(error) or type(error).__name__).splitlines()[0]
        if not url:
            raise ServerError(f"Prefect's temporary server does not work: {said}") from error
        source, remedy = _configured_by()
        raise ServerError(
            f"the Prefect server at {url} ({source}) cannot be used: {said}; start it or correct its address, or "
            f"{remedy} to do without"
        ) from error


@contextmanager
def reaching() -> Iterator[None]:
    """Let no proxy stand between this process and a server on this machine. Children start before: they keep theirs."""
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_ENABLED", "true")  # else only Prefect's own profile has it
    with loopback.direct():  # Prefect makes HTTP clients when it is imported
        from prefect.settings import PREFECT_API_URL

        url = PREFECT_API_URL.value()
    with nullcontext() if url and not loopback.is_local(url) else loopback.direct():
        yield


def bind_to_this_process() -> None:
    """See that a temporary server of this process ends with it, by kill -9 too: Prefect sees to a clean exit only."""
    if _held:
        return
    for child in psutil.Process().children():
        if _COMMAND in child.cmdline():
            _end_with_us(child.pid)


# --- details --------------------------------------------------------------------------------------


def _start_temporary() -> None:
    """Start a server where Prefect looks for a temporary one before it starts its own.

    Prefect's own would use the user's permanent database, which may be another version's or locked, and would be ended
    by the terminal's Ctrl-C before the run that still reports to it.
    """
    from prefect.server.api.server import SubprocessASGIServer

    known = SubprocessASGIServer()
    if known.running:
        return
    home = Path(tempfile.mkdtemp(prefix="numprune-prefect-"))
    with socket.create_server(("127.0.0.1", 0)) as listener, (home / "log").open("wb") as log:
        port, handle = listener.getsockname()[1], listener.fileno()
        server = subprocess.Popen(
            [sys.executable, "-P", "-m", "uvicorn", "--factory", _COMMAND, "--fd", str(handle), "--log-level", "error"],
            env=_environment(home),
            cwd=home,  # where no prefect.toml or .env is read
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[handle],
            start_new_session=True,  # Ctrl-C is for us to act on
        )
    _end_with_us(server.pid, home)
    _wait(server, port, home / "log")
    known.port, known.server_process, known.running = port, server, True
    atexit.register(server.kill)  # nothing that it knows outlives it


def _environment(home: Path) -> dict[str, str]:
    """This process's, without settings for a server that stays."""
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")},
        "PREFECT_HOME": str(home),
        "PREFECT_LOGGING_LEVEL": "ERROR",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_ENABLED": "false",
        "PREFECT__SERVER_EPHEMERAL": "1",
        "PREFECT__SERVER_FINAL": "1",
    }


def _wait(server: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + _STARTING_S
    with loopback.client(url, timeout=5.0) as client:
        while server.poll() is None and time.monotonic() < deadline:
            try:
                if client.get("/api/health").is_success:
                    return
            except httpx.TransportError:
                time.sleep(_POLL_S)
    server.kill()
    how = f"does not answer after {_STARTING_S:g} s" if server.wait() < 0 else f"ended with {server.returncode}"
    said = log.read_text(errors="replace").strip().splitlines()[-1:]
    raise ServerError(f"Prefect's temporary server {how}: {''.join(said) or 'it left no message'}")


def _end_with_us(server: int, home: Path | None = None) -> None:
    """End a server when this process has ended; one with a home of its own at once, and the home with it."""
    end = f"kill -9 {server}; rm -rf {shlex.quote(str(home))}" if home else f"kill {server}"
    watcher = subprocess.Popen(
        ["/bin/sh", "-c", f"read _; {end}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert watcher.stdin is not None  # a pipe
    _held.append(watcher.stdin)


def _configured_by() -> tuple[str, str]:
    """Where Prefect has its server's address from, and what to do against it."""
    from prefect.context import get_settings_context
    from prefect.settings import PREFECT_API_URL

    profile = get_settings_context().profile
    if PREFECT_API_URL.name in os.environ:
        return f"${PREFECT_API_URL.name}", f"unset {PREFECT_API_URL.name}"
    if PREFECT_API_URL in profile.settings:
        command = f"`prefect --profile {profile.name} config unset {PREFECT_API_URL.name}`"
        return f"from Prefect's profile {profile.name!r} in {profile.source}", command
    return "from prefect.toml, pyproject.toml or .env in the current folder", "remove it there"
