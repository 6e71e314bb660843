"""What a process may lack that every library takes for granted: standard streams, a current folder, a home folder."""

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

from numprune.errors import InputError
from numprune.export import disk


def open_closed_streams() -> None:
    """Have the null device stand in for closed standard streams, or the next file to be opened would take their place.

    `sys.stdout` stays None when it was closed: see `require_stdout`.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115


def require_stdout() -> None:
    """Raises InputError: nobody would see the answer."""
    if sys.stdout is None:
        raise InputError("standard output is closed; redirect it, for example to /dev/null")


def require_current_folder() -> None:
    """Raises InputError when it was deleted."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise InputError("the current folder was deleted; change to one that exists") from None


def provide_home() -> None:
    """Give a user without a home folder (none in HOME and passwd, or one that is not there) a temporary one, for the
    caches of libraries.

    Raises DiskError when there is no temporary folder either.
    """
    try:
        there = Path.home().is_dir()
    except RuntimeError:
        there = False
    if not there:
        home = tempfile.mkdtemp(prefix="numprune-home-", dir=disk.temporary_folder())
        atexit.register(shutil.rmtree, home, ignore_errors=True)
        os.environ["HOME"] = home
        os.environ.setdefault("USER", str(os.getuid()))  # for getpass, which else asks passwd
