"""The Prefect server that shows runs, where one is configured."""

import os
import subprocess
from contextlib import AbstractContextManager, nullcontext
from typing import IO

import psutil

from numprune.errors import NumpruneError
from numprune.serving import loopback

_COMMAND = "prefect.server.api.server:create_app"
_held: list[IO[bytes]] = []  # pipes that close when this process ends for any reason


class ServerError(NumpruneError):
    """Prefect's server cannot be reached."""


def configured() -> str:
    """The address of the server that a variable, a profile or a file in the current folder names; empty without one."""
    with loopback.direct():  # Prefect creates HTTP clients on import
        from prefect.settings import PREFECT_API_URL

        return PREFECT_API_URL.value() or ""


def reaching(url: str) -> AbstractContextManager[None]:
    """Bypass proxies for servers on this machine. Children start earlier and keep their proxies."""
    return loopback.direct() if loopback.is_local(url) else nullcontext()


def check(url: str) -> None:
    """See that the configured server answers. Raises ServerError."""
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    try:
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}), get_client(sync_client=True) as client:
            client.read_flow_runs(limit=1)
    except Exception as error:  # Prefect's own, its HTTP client's
        said = (str(error) or type(error).__name__).splitlines()[0]
        source, remedy = _configured_by()
        raise ServerError(
            f"the Prefect server at {url} ({source}) cannot be used: {said}; start it or correct its address, or "
            f"{remedy} to run without it"
        ) from error


def bind_to_this_process() -> None:
    """See that a temporary server of a flow ends with this process, by kill -9 too.

    Prefect starts one where a flow is called from Python and no server is configured, and sees to a clean exit only.
    """
    if _held:
        return
    for child in psutil.Process().children():
        if _COMMAND in child.cmdline():
            _end_with_us(child.pid)


# --- details --------------------------------------------------------------------------------------


def _end_with_us(server: int) -> None:
    watcher = subprocess.Popen(
        ["/bin/sh", "-c", f"read _; kill {server}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert watcher.stdin is not None  # a pipe
    _held.append(watcher.stdin)


def _configured_by() -> tuple[str, str]:
    """The source of Prefect's server address, and how to remove it."""
    from prefect.context import get_settings_context
    from prefect.settings import PREFECT_API_URL

    profile = get_settings_context().profile
    if PREFECT_API_URL.name in os.environ:
        return f"${PREFECT_API_URL.name}", f"unset {PREFECT_API_URL.name}"
    if PREFECT_API_URL in profile.settings:
        command = f"`prefect --profile {profile.name} config unset {PREFECT_API_URL.name}`"
        return f"from Prefect's profile {profile.name!r} in {profile.source}", command
    return "from prefect.toml, pyproject.toml or .env in the current folder", "remove it there"
