"""Atomic creation and removal of folders, and removal of what killed processes leave behind."""

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

    Its parent is a temporary folder with a lock file held by this process, so that `sweep` skips it while the process
    lives. Raises DiskError if the disk is full or cannot be written to.
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
    """Flush everything below `content` to the disk, then rename it to `folder`: a power failure leaves all or nothing.

    Raises InputError if another process was faster.
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
    """Remove a folder, even if the disk is full. It is renamed first, so that an interrupted removal leaves nothing
    half removed under its name, only remains for `sweep`. Links in it are removed, never followed.

    On an overlay file system, a folder of an image layer cannot be renamed. The files directly in it are then removed
    first, including its manifest or record, so that the rest does not pass for complete.
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
    """Return what `sweep` would remove now."""
    return [path for path in _candidates(parent) if _is_removed(path) or _is_dead(path)]


def sweep(parent: Path) -> list[Path]:
    """Remove what killed processes left of `beside` and `remove` directly in `parent`, but nothing of live processes.

    Returns the removed folders.
    """
    return [path for path in _candidates(parent) if (_discard(path) if _is_removed(path) else _remove_if_dead(path))]


def _candidates(parent: Path) -> list[Path]:
    named = [path for path in parent.iterdir() if _NAME.fullmatch(path.name)] if parent.is_dir() else []
    return [path for path in sorted(named) if path.is_dir() and not path.is_symlink()]


def _lock_new_folder(folder: Path) -> tuple[Path, int]:
    """Return the outer folder and the handle that holds its lock for the lifetime of this process."""
    while True:
        outer = folder.parent / f".{folder.name}.{secrets.token_hex(8)}.partial"
        outer.mkdir()
        try:
            lock = locks.open_file(outer / "lock")
        except FileNotFoundError:
            continue  # a sweep removed the folder before its lock was created
        locks.acquire(lock, outer / "lock")
        if (outer / "lock").exists():
            return outer, lock
        os.close(lock)  # a sweep came between open and lock


def _is_removed(path: Path) -> bool:
    return path.suffix == ".removed"


def _discard(removed: Path) -> bool:
    while removed.exists():
        try:
            shutil.rmtree(removed)
        except FileNotFoundError:
            continue  # another process is doing the same
        except PermissionError as error:
            logger.warning("%s: belongs to another user; only that user can remove it", error.filename)
            return False
    return True


def _is_dead(outer: Path) -> bool:
    try:
        return locks.is_free(outer / "lock")
    except (FileNotFoundError, PermissionError):
        return False  # being created or removed right now, or empty; another user's


def _remove_if_dead(outer: Path) -> bool:
    try:
        lock = locks.open_file(outer / "lock", create=False)
    except FileNotFoundError:
        return _remove_if_empty(outer)
    except PermissionError:
        return False  # another user's; whether its process lives is unknown
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
    """Remove a folder, its lock last: an interrupted removal leaves a folder that `sweep` still recognizes."""
    if (outer / "content").exists():
        shutil.rmtree(outer / "content")
    (outer / "lock").unlink()
    _remove_if_empty(outer)


def _remove_if_empty(outer: Path) -> bool:
    """Remove a folder without a lock file, if it is empty: its lock was not yet created, or just removed."""
    try:
        outer.rmdir()
    except OSError:
        return False
    return True
