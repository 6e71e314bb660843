"""Prefect's temporary server, which is there when no other is configured, and its end."""

import subprocess
from typing import IO

import psutil

_COMMAND = "prefect.server.api.server:create_app"
_held: list[IO[bytes]] = []  # pipes that close when this process ends, however it ends


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
