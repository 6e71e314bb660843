"""The errors a user can mend. Each message names the field or file, the value given, and the remedy.

The one module that every package may import: the command line turns these into one line and an exit code; anything else
that is raised is a bug and keeps its traceback.
"""


class NumpruneError(Exception):
    """Something the user can mend."""


class InputError(NumpruneError):
    """A model, file, recipe or argument that cannot be used as given."""


class IntegrityError(NumpruneError):
    """A file whose digest, size, shape or content is not what its manifest or configuration says."""


class ParityError(NumpruneError):
    """Two runtimes that should compute the same do not."""


class MissingRuntime(NumpruneError):
    """A runtime whose libraries or device are not there; the message says what to install."""


class EnvironmentInvalid(NumpruneError):
    """The machine is in a state in which its measurements mean nothing."""


class DiskError(NumpruneError):
    """A file system that has no room, is read-only, refuses us, or fails."""
