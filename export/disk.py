"""What file systems refuse, in words: which path, why, how many bytes were needed and are free, and what to do."""

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
_BELOW_BYTES = 60  # of what is put below it: "/pymp-…/listener-…", or a server's "/numprune-…" with vLLM's UUID in it
_SHORT = ("/tmp", "/var/tmp", "/dev/shm")  # noqa: S108 - where Python itself looks, too
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_RUST = re.compile(r"\(os error (\d+)\)")  # as safetensors, which is written in it, ends its messages


def refusal(error: BaseException) -> DiskError | None:
    """The error in the user's words, when it is a file system that refused; None when it is anything else."""
    code = code_of(error)
    if code is None:
        return None
    path = getattr(error, "filename", None)
    where = f"{os.fsdecode(path)}: " if isinstance(path, str | bytes) else ""
    return DiskError(f"{where}{os.strerror(code)}; {_REMEDIES[code]}")


def code_of(error: BaseException) -> int | None:
    """The error number with which a file system refused, if it did."""
    if isinstance(error, OSError):
        return error.errno if error.errno in _REMEDIES else None
    found = _RUST.search(str(error)) if isinstance(error, SafetensorError) else None
    return int(found[1]) if found and int(found[1]) in _REMEDIES else None


@contextmanager
def writing(folder: Path, content: Path) -> Iterator[None]:
    """Say what went wrong of `folder`, which is written as `content`: its real place, its size so far, what is free.

    Raises DiskError for what a file system refuses; other errors stay as they are.
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
    """Put a file, or the names in a folder, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Network and FUSE file systems refuse it for folders; they keep the order of renames in their own way.
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
    """The temporary folder or, where that is too long for a Unix socket below it, another. Raises DiskError."""
    asked = temporary_folder()
    for folder in (asked, *_SHORT):
        if len(os.fsencode(folder)) + _BELOW_BYTES <= _SOCKET_BYTES and os.access(folder, os.W_OK | os.X_OK):
            return folder
    raise DiskError(
        f"TMPDIR {asked}: too long for Unix sockets; choose one of at most {_SOCKET_BYTES - _BELOW_BYTES} bytes"
    )


def require_room(folder: Path, size: int) -> None:
    """Raises DiskError when `folder`, which need not exist, cannot take `size` bytes more."""
    free = free_bytes(folder)
    if free < size:
        raise DiskError(f"{folder}: {size:,} bytes are needed, {free:,} are free; {_ROOM}")


def require_writable(folder: Path) -> None:
    """Raises DiskError when a folder that shall be made or written in cannot be.

    It is tried: root's permissions say nothing about /proc.
    """
    there = _existing(folder)
    if not there.is_dir():
        raise DiskError(f"{there}: not a folder; {_REMEDIES[errno.ENOTDIR]}")
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".numprune-", dir=there))
    except OSError as error:
        code = code_of(error)
        reason = os.strerror(code) if code else "nothing can be created there"
        raise DiskError(f"{there}: {reason}; {_REMEDIES[code or errno.EROFS]}") from None


def free_bytes(folder: Path) -> int:
    """What is free where `folder` is, or will be."""
    return shutil.disk_usage(_existing(folder)).free


def bytes_below(folder: Path) -> int:
    """The sizes of the files below `folder`, in all."""
    return sum(os.lstat(os.path.join(where, name)).st_size for where, _, names in os.walk(folder) for name in names)


def _is_below(path: str | bytes, folder: Path) -> bool:
    return Path(os.fsdecode(path)).is_relative_to(folder)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    return next(path for path in (folder, *folder.parents) if path.exists())
