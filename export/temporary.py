"""A folder that is written beside its final place and renamed into it; what killed processes leave, and its removal."""

import errno
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from numprune.errors import InputError
from numprune.export import disk, locks

logger = logging.getLogger(__name__)

_NAME = re.compile(r"\..+\.[0-9a-f]{16}\.(partial|removed)")


@contextmanager
def beside(folder: Path) -> Iterator[Path]:
    """Yield a new empty folder next to `folder` (same file system). It is removed on exit, unless `move` renamed it.

    Around it stands a folder with a lock file that this process holds: `sweep` leaves alone what is still alive.
    Raises DiskError when the disk is full, or refuses to be written to.
    """
    disk.require_writable(folder.parent)
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
            disk.sync(path)
    try:
        os.rename(content, folder)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise InputError(f"{folder}: another process created it in the meantime") from None
        raise
    disk.sync(folder.parent)


def remove(folder: Path) -> None:
    """Remove a folder, without room for anything on the disk. It loses its name first, so whoever is killed meanwhile
    leaves no half of it under that name, only what a sweep removes. Links in it are removed, never followed.

    On an overlay a folder of an image's layer keeps its name. What stands directly in it then goes first, its manifest
    or record with it: nobody takes the rest for whole.
    """
    removed = folder.parent / f".{folder.name}.{secrets.token_hex(8)}.removed"
    try:
        os.rename(folder, removed)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        for path in folder.iterdir():
            if path.is_symlink() or not path.is_dir():
                path.unlink()
        removed = folder
    disk.sync(folder.parent)
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


def _lock_new_folder(folder: Path) -> tuple[Path, int]:
    """The outer folder and the handle that holds its lock for as long as this process lives."""
    while True:
        outer = folder.parent / f".{folder.name}.{secrets.token_hex(8)}.partial"
        outer.mkdir()
        try:
            lock = locks.open_file(outer / "lock")
        except FileNotFoundError:
            continue  # a sweep met the folder before its lock was in it
        locks.acquire(lock, outer / "lock")
        if (outer / "lock").exists():
            return outer, lock
        os.close(lock)  # a sweep was between our open and our lock


def _is_removed(path: Path) -> bool:
    return path.suffix == ".removed"


def _discard(removed: Path) -> bool:
    while removed.exists():
        try:
            shutil.rmtree(removed)
        except FileNotFoundError:
            continue  # another process does the same at this moment
        except PermissionError as error:
            logger.warning("%s: belongs to another user; only that user can remove it", error.filename)
            return False
    return True


def _is_dead(outer: Path) -> bool:
    try:
        return locks.is_free(outer / "lock")
    except (FileNotFoundError, PermissionError):
        return False  # being made or removed at this moment, or empty; another user's


def _remove_if_dead(outer: Path) -> bool:
    try:
        lock = locks.open_file(outer / "lock", create=False)
    except FileNotFoundError:
        return _remove_if_empty(outer)
    except PermissionError:
        return False  # another user's, and nobody can say whether its process lives
    try:
        locks.acquire(lock, outer / "lock", wait=False)
        if not (outer / "lock").exists():
            return False  # its process finished just now
        _remove(outer)
    except locks.Held:
        return False  # its process lives
    except PermissionError as error:
        logger.warning("%s: left by another user's run; only that user can remove it", error.filename)
        return False
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
