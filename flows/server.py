"""The Prefect server that shows runs, where one is configured."""

import os
import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext, redirect_stderr
from io import StringIO
from typing import IO

import psutil
from pydantic import ValidationError

from numprune.errors import NumpruneError
from numprune.serving import loopback

_COMMAND = "prefect.server.api.server:create_app"
_held: list[IO[bytes]] = []  # pipes that close when this process ends for any reason


class ServerError(NumpruneError):
    """Prefect's server cannot be reached."""


def configured() -> str:
    """The address of the server that a variable, a profile or a file in the current folder names; empty without one.

    Raises ServerError for settings that Prefect cannot read.
    """
    said = StringIO()
    try:
        # Prefect creates HTTP clients and reads its settings on import, and prints some of the errors.
        with redirect_stderr(said), loopback.direct():
            from prefect.settings import PREFECT_API_URL

            url = PREFECT_API_URL.value() or ""
    except ValueError as error:  # pydantic's errors, and those of TOML
        raise ServerError(f"Prefect's settings cannot be read: {_unreadable(error)}") from error
    sys.stderr.write(said.getvalue())
    return url


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

    Prefect starts one if a flow is called from Python without a configured server, and stops it only on a clean exit.
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


def _unreadable(error: ValueError) -> str:
    """What is wrong with Prefect's settings, where, and what to do. Values are not repeated: some are secret."""
    place = "prefect.toml, pyproject.toml or .env in the current folder, or Prefect's profiles.toml"
    if not isinstance(error, ValidationError):
        return f"{error}; correct {place}"
    problem = error.errors(include_url=False, include_input=False)[0]
    field = ".".join(map(str, problem["loc"]))
    variables = [name for name in os.environ if name.startswith("PREFECT_") and name.endswith(f"_{field.upper()}")]
    if variables:
        return f"${variables[0]}: {problem['msg']}; correct or unset {' or '.join(variables)}"
    return f"{field}: {problem['msg']}; correct or remove it in {place}"


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
