"""What goes wrong with a registry, in words."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from numprune.errors import NumpruneError
from numprune.serving.gates import exit_code
from numprune.serving.report import Verdict

_STORE = {"mlflow", "sqlalchemy", "sqlite3", "alembic", "requests", "urllib3"}  # packages whose errors are a registry's
_HTTP = {"requests", "urllib3"}
_SECRETS = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")

_AGAIN = "run the same command again: nothing half-made counts"


class RegistryError(NumpruneError):
    """The registry cannot be reached, written or understood."""


class RefusedReleaseError(NumpruneError):
    """The verdict is not `pass`; nothing was published. `exit_code` is the command's."""

    def __init__(self, message: str, verdict: Verdict) -> None:
        super().__init__(message)
        self.verdict = verdict
        self.exit_code = exit_code(verdict)


@contextmanager
def speaking(about: str) -> Iterator[None]:
    """What MLflow, its database, its HTTP client or the disk raise comes out as a RegistryError about `about`.

    It says what to do, and holds no password or token. Any other exception is a bug and stays as it is.
    """
    try:
        yield
    except NumpruneError:
        raise
    except Exception as error:
        if isinstance(error, ImportError) and error.name and not error.name.startswith("numprune"):
            raise RegistryError(f"{about}: its store needs the Python package {error.name} here: install it") from error
        packages = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
        if not isinstance(error, OSError) and not packages & _STORE:
            raise
        chain = list(_chain(error))
        message = f"{about}{_explained(chain)}"
        # A traceback prints the whole chain, so an error that tells a secret is not part of it.
        silent = any(without_secrets(str(link)) != str(link) for link in chain)
        raise RegistryError(without_secrets(message)) from (None if silent else error)


def error_code(error: Exception) -> str:
    """The name MLflow gives an error, or nothing."""
    return str(getattr(error, "error_code", ""))


def lost_race(error: Exception) -> bool:
    """Whether another client created the same database entry concurrently: MLflow checks first, then inserts."""
    return error_code(error) == "BAD_REQUEST" and "unique" in str(error).lower()


def without_secrets(text: str) -> str:
    """`text` with `***` for the user and password of an address, and for MLflow's password and token."""
    text = re.sub(r"://[^\s'\"]*@", "://***@", text)
    for name in _SECRETS:
        secret = os.environ.get(name, "").strip()
        if secret:
            text = text.replace(secret, "***")
    return text


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and, one after the other, what it came from."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__


def _explained(chain: list[BaseException]) -> str:
    """What happened and what to do about it, to follow the registry's name."""
    error = chain[0]
    sent = next((link for link in chain if type(link).__module__.partition(".")[0] in _HTTP), None)
    status = getattr(getattr(sent, "response", None), "status_code", None)
    code = error_code(error) if isinstance(error, Exception) else ""
    if type(sent).__name__ == "InvalidHeader":
        return ": the token in MLFLOW_TRACKING_TOKEN cannot be sent; it holds a line break or a blank at an end"
    if status == 401 or code in ("UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED"):
        return (
            " does not know who we are (401): set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, "
            "or MLFLOW_TRACKING_TOKEN, to what it accepts"
        )
    if status == 403 or code == "PERMISSION_DENIED":
        return f" refuses this user (403): {_first_line(error)}; ask who runs it for the permission to edit"
    if (status or 0) >= 500 or type(sent).__name__ == "RetryError":
        return (
            f" answers with errors ({_reason(sent or error)}): its log says why, mostly that its database or artifact "
            f"store is down; {_AGAIN}"
        )
    if sent is not None and status is None:
        return f" cannot be reached ({_reason(sent)}): is it running, and is its address right? When it is, {_AGAIN}"
    return f": {_first_line(error)}"


def _reason(error: BaseException) -> str:
    """The innermost of what requests and urllib3 wrapped: `Connection refused`, `too many 500 error responses`."""
    while True:
        inner = [getattr(error, "reason", None), *reversed(error.args), error.__cause__]
        found = next((one for one in inner if isinstance(one, BaseException)), None)
        if found is None:
            return getattr(error, "strerror", None) or _first_line(error)
        error = found


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
