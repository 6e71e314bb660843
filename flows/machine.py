"""Process prerequisites that libraries take for granted: standard streams, a current folder, a home folder."""

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

from numprune.errors import InputError
from numprune.export import disk


def open_closed_streams() -> None:
    """Replace closed standard streams by the null device; otherwise the next opened file would take their place.

    `sys.stdout` stays None if it was closed: see `require_stdout`.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free descriptor
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115


def require_stdout() -> None:
    """Raises InputError if stdout is closed: nobody would see the result."""
    if sys.stdout is None:
        raise InputError("standard output is closed; redirect it, for example to /dev/null")


def require_current_folder() -> None:
    """Raises InputError if it was deleted."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise InputError("the current folder was deleted; change to an existing one") from None


def provide_home() -> None:
    """Give a user without a home folder (none in HOME and passwd, or a missing one) a temporary one for library caches.

    Raises DiskError if there is no temporary folder either.
    """
    try:
        there = Path.home().is_dir()
    except RuntimeError:
        there = False
    if not there:
        home = tempfile.mkdtemp(prefix="numprune-home-", dir=disk.temporary_folder())
        atexit.register(shutil.rmtree, home, ignore_errors=True)
        os.environ["HOME"] = home
        os.environ.setdefault("USER", str(os.getuid()))  # for getpass, which otherwise reads passwd
