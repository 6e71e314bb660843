"""Prefect's temporary server, which is there when no other is configured: its start and its end."""

import os
import subprocess
from typing import IO

import psutil
from filelock import FileLock

from numprune.errors import NumpruneError

_COMMAND = "prefect.server.api.server:create_app"
_held: list[IO[bytes]] = []  # pipes that close when this process ends, however it ends


class ServerError(NumpruneError):
    """Prefect's server cannot be reached or started."""


def start() -> None:
    """Start the temporary server of this process, unless another server is configured; see that it answers.

    One process at a time: the first start makes Prefect's database, and two that do it at once break it.
    Raises ServerError.
    """
    from prefect.client.orchestration import get_client
    from prefect.settings import get_current_settings

    home = get_current_settings().home
    home.mkdir(parents=True, exist_ok=True)
    where = os.environ.get("PREFECT_API_URL", "a temporary server")
    try:
        with FileLock(home / "numprune.lock"), get_client(sync_client=True) as client:
            client.read_flow_runs(limit=1)
    except Exception as error:  # Prefect's own, its HTTP client's, its database's
        raise ServerError(
            f"Prefect does not answer ({where}): {error}; start that server, or unset PREFECT_API_URL to do without"
        ) from error


def bind_to_this_process() -> None:
    """See that a temporary server of this process ends with it, by kill -9 too: Prefect sees to a clean exit only."""
    if _held:
        return
    for child in psutil.Process().children():
        if _COMMAND in child.cmdline():
            watcher = subprocess.Popen(
                ["/bin/sh", "-c", f"read _; kill {child.pid} 2>/dev/null"],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for us to act on
            )
            assert watcher.stdin is not None  # a pipe
            _held.append(watcher.stdin)
