"""File locks (flock): held by a process, and freed by the kernel however the process ends.

Several users may share a folder: a lock file gets its permissions from the umask, and anybody who can read it can lock
it.
"""

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from numprune.errors import DiskError

_WITHOUT = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EBADF}
_POLL_S = 0.05


class Held(Exception):
    """Another process holds the lock."""


def open_file(path: Path, *, create: bool = True) -> int:
    """Open a lock file. Raises OSError; with `create`, only if the file can be neither created nor read."""
    flags = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        return os.open(path, os.O_RDWR | flags | (os.O_CREAT if create else 0), 0o666)
    except PermissionError:
        return os.open(path, os.O_RDONLY | flags)  # another user's, not writable by the group


def acquire(handle: int, path: Path, *, wait: bool = True, shared: bool = False) -> None:
    """Lock an open file until the last handle of this opening is closed.

    Raises Held if it must not wait, and DiskError for a file system without locks.
    """
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise Held(path) from None
    except OSError as error:
        if error.errno not in _WITHOUT:
            raise
        raise DiskError(
            f"{path}: files cannot be locked here ({os.strerror(error.errno)}), and two runs at once would damage each "
            "other's work; choose a folder on a local disk, or mount it with locks (NFS: a lock service, or `-o "
            "local_lock=flock` if only one machine uses it; Lustre: `-o flock`)"
        ) from None


def is_free(path: Path) -> bool:
    """Return whether the lock of an existing file is free. Raises OSError if it cannot be opened, DiskError."""
    handle = open_file(path, create=False)
    try:
        acquire(handle, path, wait=False, shared=True)  # shared: two that ask at once do not see each other
    except Held:
        return False
    finally:
        os.close(handle)
    return True


@contextmanager
def held(path: Path, *, timeout_s: float | None = None, shared: bool = False) -> Iterator[None]:
    """Hold the lock of a file; the file and its folder are created if missing.

    Args:
        timeout_s: give up after this time; None waits forever, 0 does not wait.
        shared: with all others that share it.

    Raises Held, DiskError (a file system without locks), OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = open_file(path)
    try:
        _acquire_within(handle, path, timeout_s, shared)
        yield
    finally:
        os.close(handle)


def _acquire_within(handle: int, path: Path, timeout_s: float | None, shared: bool) -> None:
    if timeout_s is None:
        acquire(handle, path, shared=shared)
        return
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            acquire(handle, path, wait=False, shared=shared)
            return
        except Held:
            if time.monotonic() >= deadline:
                raise
        time.sleep(_POLL_S)
