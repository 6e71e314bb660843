"""File-system errors explained: the path, the reason, the bytes needed and free, and the remedy."""

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from numprune.errors import DiskError

_ROOM = "free some space there and run the same command again; finished work is kept"
_REMEDIES = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: "the file exceeds a size limit (`ulimit -f`, or the file system's own)",
    errno.EROFS: "choose a writable folder",
    errno.EACCES: "change its permissions, or choose another folder",
    errno.EPERM: "change its permissions, or choose another folder",
    errno.ENOTDIR: "there is a file where a folder should be",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.EIO: "the disk or the connection to it is failing",
    errno.ESTALE: "the connection to the file server was lost",
    errno.EMFILE: "allow more open files (`ulimit -n`)",
    errno.ENFILE: "the system has run out of open files",
}
_SOCKET_BYTES = 107  # of a Unix socket's path, on Linux
_BELOW_BYTES = 60  # length of the names below it: "/pymp-…/listener-…", or a server's "/numprune-…" with vLLM's UUID
_SHORT = ("/tmp", "/var/tmp", "/dev/shm")  # noqa: S108 - where Python itself looks, too
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_RUST = re.compile(r"\(os error (\d+)\)")  # safetensors is written in Rust; its messages end like this


def refusal(error: BaseException) -> DiskError | None:
    """Return the error in plain words if it came from a file system, otherwise None."""
    code = code_of(error)
    if code is None:
        return None
    path = getattr(error, "filename", None)
    where = f"{os.fsdecode(path)}: " if isinstance(path, str | bytes) else ""
    return DiskError(f"{where}{os.strerror(code)}; {_REMEDIES[code]}")


def code_of(error: BaseException) -> int | None:
    """Return the errno of a file-system error, or None."""
    if isinstance(error, OSError):
        return error.errno if error.errno in _REMEDIES else None
    found = _RUST.search(str(error)) if isinstance(error, SafetensorError) else None
    return int(found[1]) if found and int(found[1]) in _REMEDIES else None


@contextmanager
def writing(folder: Path, content: Path) -> Iterator[None]:
    """Turn errors while writing `folder` (as `content`) into messages with its final path, size so far and free space.

    Raises DiskError for file-system errors; other errors pass through.
    """
    try:
        yield
    except DiskError as error:  # of a part of it
        raise DiskError(str(error).replace(str(content), str(folder))) from error
    except (OSError, SafetensorError) as error:
        code = code_of(error)
        if code is None:
            raise
        if isinstance(error, OSError) and error.filename and not _is_below(error.filename, content):
            raise refusal(error) or error from None
        raise DiskError(f"{_full(code, folder, content)}; {_REMEDIES[code]}") from error


def _full(code: int, folder: Path, content: Path) -> str:
    what = os.strerror(code)
    if code not in _FULL:
        return f"{folder}: {what}"
    written = bytes_below(content)
    scratch = Path(tempfile.gettempdir())
    if code != errno.EFBIG and free_bytes(scratch) < free_bytes(folder):  # the system does not say which one is full
        return f"{scratch}: {what}: {free_bytes(scratch):,} bytes are free"
    free = "" if code == errno.EFBIG else f", {free_bytes(folder) + written:,} are free"
    return f"{folder}: {what}: more than {written:,} bytes are needed{free}"


def sync(path: Path) -> None:
    """Flush a file, or the directory entries of a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Network and FUSE file systems refuse it for folders; they order renames in their own way.
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP) or not path.is_dir():
            raise
    finally:
        os.close(handle)


def temporary_folder() -> str:
    """`tempfile.gettempdir()`. Raises DiskError without one, as in a read-only container."""
    try:
        return tempfile.gettempdir()
    except FileNotFoundError as error:
        raise DiskError(f"{error.strerror}; set TMPDIR to a writable folder") from None


def folder_for_sockets() -> str:
    """Return the temporary folder, or another if its path is too long for Unix sockets. Raises DiskError."""
    asked = temporary_folder()
    for folder in (asked, *_SHORT):
        if len(os.fsencode(folder)) + _BELOW_BYTES <= _SOCKET_BYTES and os.access(folder, os.W_OK | os.X_OK):
            return folder
    raise DiskError(
        f"TMPDIR {asked}: too long for Unix sockets; choose one of at most {_SOCKET_BYTES - _BELOW_BYTES} bytes"
    )


def require_room(folder: Path, size: int) -> None:
    """Raise DiskError if the file system of `folder`, which need not exist, has less than `size` bytes free."""
    free = free_bytes(folder)
    if free < size:
        raise DiskError(f"{folder}: {size:,} bytes are needed, {free:,} are free; {_ROOM}")


def require_writable(folder: Path) -> None:
    """Raise DiskError if a folder cannot be created or written to.

    It is tried for real: permission bits say nothing about root in /proc.
    """
    there = existing(folder)
    if not there.is_dir():
        raise DiskError(f"{there}: not a folder; {_REMEDIES[errno.ENOTDIR]}")
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".numprune-", dir=there))
    except OSError as error:
        code = code_of(error)
        reason = os.strerror(code) if code else "nothing can be created there"
        raise DiskError(f"{there}: {reason}; {_REMEDIES[code or errno.EROFS]}") from None


def free_bytes(folder: Path) -> int:
    """Return the bytes free on the file system where `folder` is or will be."""
    return shutil.disk_usage(existing(folder)).free


def bytes_below(folder: Path) -> int:
    """Return the total size of the files below `folder`."""
    return sum(os.lstat(os.path.join(where, name)).st_size for where, _, names in os.walk(folder) for name in names)


def _is_below(path: str | bytes, folder: Path) -> bool:
    return Path(os.fsdecode(path)).is_relative_to(folder)


def existing(folder: Path) -> Path:
    """Return the folder or its nearest existing parent."""
    return next(path for path in (folder, *folder.parents) if path.exists())
