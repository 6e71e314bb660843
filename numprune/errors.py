"""Errors that a user can fix. Each message names the field or file, the value, and the remedy.

Every package may import this module. The command line turns these errors into one line and an exit code; any other
exception is a bug and keeps its traceback.
"""


class NumpruneError(Exception):
    """An error that the user can fix."""


class InputError(NumpruneError):
    """A model, file, recipe or argument that cannot be used as given."""


class IntegrityError(NumpruneError):
    """A file whose digest, size, shape or content contradicts its manifest or configuration."""


class ParityError(NumpruneError):
    """Two runtimes that should compute the same do not."""


class MissingRuntime(NumpruneError):
    """A runtime whose libraries or device are missing; the message says what to install."""


class EnvironmentInvalid(NumpruneError):
    """The machine is in a state in which measurements are meaningless."""


class ProcessError(NumpruneError):
    """Another process of the same command ended before its work was done."""


class DiskError(NumpruneError):
    """A file system that is full or read-only, denies access, or fails."""


def reason(error: BaseException) -> str:
    """Return the last line of a transformers error, the most informative one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:500] if lines else type(error).__name__
