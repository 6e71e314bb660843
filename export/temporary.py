"""A folder that is written beside its final place and renamed into it; what killed processes leave, and its removal."""

import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from numprune.errors import InputError

_NAME = re.compile(r"\..+\.[0-9a-f]{16}\.partial")


@contextmanager
def beside(folder: Path) -> Iterator[Path]:
    """Yield a new empty folder next to `folder` (same file system). It is removed on exit, unless `move` renamed it.

    Around it stands a folder with a lock file that this process holds: `sweep` leaves alone what is still alive.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    outer, lock = _lock_new_folder(folder)
    try:
        content = outer / "content"
        content.mkdir()
        yield content
    finally:
        _remove(outer)
        os.close(lock)


def move(content: Path, folder: Path) -> None:
    """Put everything below `content` on the disk, then rename it to `folder`: a power cut leaves all of it or nothing.

    Raises InputError when another process was faster.
    """
    for where, _, files in os.walk(content, topdown=False):
        for path in [*(Path(where) / name for name in files), Path(where)]:
            _fsync(path)
    try:
        os.rename(content, folder)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise InputError(f"{folder}: another process created it in the meantime") from None
        raise
    _fsync(folder.parent)


def sweep(parent: Path) -> list[Path]:
    """Remove what killed processes left of `beside` directly in `parent`; those of live processes stay.

    Returns the removed folders.
    """
    candidates = [path for path in parent.iterdir() if _NAME.fullmatch(path.name)] if parent.is_dir() else []
    return [path for path in sorted(candidates) if path.is_dir() and not path.is_symlink() and _remove_if_dead(path)]


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _lock_new_folder(folder: Path) -> tuple[Path, int]:
    """The outer folder and the handle that holds its lock for as long as this process lives."""
    while True:
        outer = folder.parent / f".{folder.name}.{secrets.token_hex(8)}.partial"
        outer.mkdir()
        try:
            lock = os.open(outer / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            continue  # a sweep met the folder before its lock was in it
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (outer / "lock").exists():
            return outer, lock
        os.close(lock)  # a sweep was between our open and our lock


def _remove_if_dead(outer: Path) -> bool:
    try:
        lock = os.open(outer / "lock", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return _remove_if_empty(outer)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not (outer / "lock").exists():
            return False  # its process finished just now
        _remove(outer)
    except BlockingIOError:
        return False  # its process lives
    finally:
        os.close(lock)
    return True


def _remove(outer: Path) -> None:
    """The lock goes last: whoever is killed in the middle leaves a folder that a sweep still understands."""
    if (outer / "content").exists():
        shutil.rmtree(outer / "content")
    (outer / "lock").unlink()
    _remove_if_empty(outer)


def _remove_if_empty(outer: Path) -> bool:
    """Without its lock (not yet made, or just removed) a folder is empty, and any sweep may be the one to remove it."""
    try:
        outer.rmdir()
    except OSError:
        return False
    return True
