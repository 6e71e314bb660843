"""Errors of registries."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from numprune.errors import NumpruneError
from numprune.serving.gates import exit_code
from numprune.serving.report import Verdict

_STORE = {
    "mlflow",
    "sqlalchemy",
    "sqlite3",
    "alembic",
    "requests",
    "urllib3",
}  # their errors are the registry's
_HTTP = {"requests", "urllib3"}
_SECRETS = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")

_AGAIN = "run the same command again: incomplete versions are ignored"


class RegistryError(NumpruneError):
    """The registry cannot be reached, written or read."""


class RefusedReleaseError(NumpruneError):
    """The verdict is not `pass`; nothing was published. `exit_code` is the command's."""

    def __init__(self, message: str, verdict: Verdict) -> None:
        super().__init__(message)
        self.verdict = verdict
        self.exit_code = exit_code(verdict)


@contextmanager
def speaking(about: str) -> Iterator[None]:
    """Convert errors of MLflow, its database, its HTTP client or the disk into a RegistryError about `about`.

    The message names the remedy and contains no password or token. Any other exception is a bug and passes through.
    """
    try:
        yield
    except NumpruneError:
        raise
    except Exception as error:
        if isinstance(error, ImportError) and error.name and not error.name.startswith("numprune"):
            raise RegistryError(f"{about}: its store needs the Python package {error.name}; install it here") from error
        packages = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
        if not isinstance(error, OSError) and not packages & _STORE:
            raise
        chain = list(_chain(error))
        message = f"{about}{_explained(chain)}"
        # A traceback prints the whole chain, so an error that contains a secret is removed from it.
        silent = any(without_secrets(str(link)) != str(link) for link in chain)
        raise RegistryError(without_secrets(message)) from (None if silent else error)


def error_code(error: Exception) -> str:
    """MLflow's name for an error, or ""."""
    return str(getattr(error, "error_code", ""))


def lost_race(error: Exception) -> bool:
    """Whether another client concurrently created the same database entry: MLflow checks, then inserts."""
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
    """The error followed by its causes."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__


def _explained(chain: list[BaseException]) -> str:
    """What happened and the remedy, to follow the registry's name."""
    error = chain[0]
    sent = next((link for link in chain if type(link).__module__.partition(".")[0] in _HTTP), None)
    status = getattr(getattr(sent, "response", None), "status_code", None)
    code = error_code(error) if isinstance(error, Exception) else ""
    if type(sent).__name__ == "InvalidHeader":
        return ": MLFLOW_TRACKING_TOKEN cannot be sent: it contains a line break, or starts or ends with a blank"
    if status == 401 or code in ("UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED"):
        return (
            " rejects the credentials (401): set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, "
            "or MLFLOW_TRACKING_TOKEN"
        )
    if status == 403 or code == "PERMISSION_DENIED":
        return f" denies this user (403): {_first_line(error)}; ask its administrator for edit permission"
    if (status or 0) >= 500 or type(sent).__name__ == "RetryError":
        return (
            f" returns errors ({_reason(sent or error)}): see its log; usually its database or artifact store is down; "
            f"{_AGAIN}"
        )
    if sent is not None and status is None:
        return f" cannot be reached ({_reason(sent)}): check that it is running and its address, then {_AGAIN}"
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
