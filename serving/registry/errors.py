"""What goes wrong with a registry, in words."""

from collections.abc import Iterator
from contextlib import contextmanager

from numprune.errors import NumpruneError
from numprune.serving.gates import exit_code
from numprune.serving.report import Verdict

_STORE = {"mlflow", "sqlalchemy", "sqlite3", "alembic", "requests", "urllib3"}  # packages whose errors are a registry's


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

    Anything else is a mistake of ours and stays as it is.
    """
    try:
        yield
    except NumpruneError:
        raise
    except Exception as error:
        packages = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
        if not isinstance(error, OSError) and not packages & _STORE:
            raise
        text = next(iter(str(error).splitlines()), type(error).__name__)
        raise RegistryError(f"{about}: {text}") from error


def error_code(error: Exception) -> str:
    """The name MLflow gives an error, or nothing."""
    return str(getattr(error, "error_code", ""))
