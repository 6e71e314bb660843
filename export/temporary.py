"""A folder that is written beside its final place and renamed into it; what killed processes leave, and its removal."""

import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from numprune.errors import InputError
from numprune.export import disk

_NAME = re.compile(r"\..+\.[0-9a-f]{16}\.(partial|removed)")


@contextmanager
def beside(folder: Path) -> Iterator[Path]:
    """Yield a new empty folder next to `folder` (same file system). It is removed on exit, unless `move` renamed it.

    Around it stands a folder with a lock file that this process holds: `sweep` leaves alone what is still alive.
    Raises DiskError when the disk is full, or refuses to be written to.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    outer, lock = _lock_new_folder(folder)
    try:
        content = outer / "content"
        with disk.writing(folder, content):
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


def remove(folder: Path) -> None:
    """Remove a folder, without room for anything on the disk. It loses its name first, so whoever is killed meanwhile
    leaves no half of it under that name, only what a sweep removes. Links in it are removed, never followed.
    """
    removed = folder.parent / f".{folder.name}.{secrets.token_hex(8)}.removed"
    os.rename(folder, removed)
    _fsync(folder.parent)
    _discard(removed)


def abandoned(parent: Path) -> list[Path]:
    """What `sweep` would remove now."""
    return [path for path in _candidates(parent) if _is_removed(path) or _is_dead(path)]


def sweep(parent: Path) -> list[Path]:
    """Remove what killed processes left of `beside` and `remove` directly in `parent`; that of live processes stays.

    Returns the removed folders.
    """
    return [path for path in _candidates(parent) if (_discard(path) if _is_removed(path) else _remove_if_dead(path))]


def _candidates(parent: Path) -> list[Path]:
    named = [path for path in parent.iterdir() if _NAME.fullmatch(path.name)] if parent.is_dir() else []
    return [path for path in sorted(named) if path.is_dir() and not path.is_symlink()]


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


def _is_removed(path: Path) -> bool:
    return path.suffix == ".removed"


def _discard(removed: Path) -> bool:
    while removed.exists():
        with suppress(FileNotFoundError):  # another process does the same at this moment
            shutil.rmtree(removed)
    return True


def _is_dead(outer: Path) -> bool:
    try:
        lock = os.open(outer / "lock", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False  # being made or removed at this moment, or empty
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
    return True


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
