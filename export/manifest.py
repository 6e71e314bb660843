"""Artifact folders: their content and origin by digest, created atomically.

A folder is written beside its final path, given a `manifest.json` with the SHA-256 digest and size of every file,
flushed to the disk and renamed. A folder that exists is therefore complete. The remains of a killed process have a
different name, and `sweep` removes them.
"""

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, ValidationError

from numprune.errors import InputError, IntegrityError
from numprune.export import temporary

sweep = temporary.sweep  # of the folders in which `creating` works

FILE_NAME = "manifest.json"
MAXIMUM_BYTES = 16 << 20  # a manifest is read before anything is verified, so it must not be able to exhaust memory


@dataclass(frozen=True)
class FileEntry:
    """One file: hexadecimal SHA-256 digest and size in bytes."""

    sha256: str
    size: int


@dataclass(frozen=True)
class Manifest:
    """The content of a folder. Paths are relative, with `/`; `manifest.json` itself is not listed."""

    kind: str
    files: Mapping[str, FileEntry]
    parents: Mapping[str, str] = field(default_factory=dict)  # role -> digest of an input
    facts: Mapping[str, JsonValue] = field(default_factory=dict)  # options, versions

    @property
    def digest(self) -> str:
        """SHA-256 over the canonical JSON of everything above: the identity of the artifact."""
        return _digest(self._content())

    def _content(self) -> dict[str, Any]:
        return {
            "schema": "numprune/manifest/1",
            "kind": self.kind,
            "files": {path: {"sha256": entry.sha256, "size": entry.size} for path, entry in self.files.items()},
            "parents": dict(self.parents),
            "facts": dict(self.facts),
        }

    def to_json(self) -> str:
        return json.dumps({**self._content(), "digest": self.digest}, indent=1, sort_keys=True, allow_nan=False) + "\n"


def sha256_file(path: Path) -> str:
    """Return the hexadecimal SHA-256 digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_digest(folder: Path) -> str:
    """Return the identity of a folder: its manifest's digest, verified first, or one over its files without a manifest.

    Without a manifest, top-level names that start with a dot are left out (`.git`, a downloader's `.cache`), and links
    to files are followed (a hub's snapshot folders consist of them). Raises InputError, IntegrityError.
    """
    if (folder / FILE_NAME).is_file():
        return verify(folder).digest
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    names = _walk(folder, follow_files=True, skip_hidden=True)
    return _digest({name: sha256_file(folder / name) for name in names})


@contextmanager
def creating(
    folder: Path, *, kind: str, parents: Mapping[str, str] | None = None, facts: Mapping[str, JsonValue] | None = None
) -> Iterator[Path]:
    """Yield an empty folder to write into; on a clean exit it gets a manifest and becomes `folder`.

    Raises InputError if `folder` exists, both before the work and after it (another process was faster). If the body
    raises, its unfinished folder is removed. Facts are recorded as they are on entry.
    """
    if os.path.lexists(folder):
        raise InputError(f"{folder}: already exists; choose another folder or remove it")
    frozen = json.loads(_canonical({"parents": dict(parents or {}), "facts": dict(facts or {})}))
    with temporary.beside(folder) as content:
        yield content
        if os.path.lexists(content / FILE_NAME):
            raise ValueError(f"{FILE_NAME} is written by `creating`, not by its body")
        files = {name: _entry(content / name) for name in _walk(content)}
        manifest = Manifest(kind, files, frozen["parents"], frozen["facts"])
        (content / FILE_NAME).write_text(manifest.to_json(), encoding="utf-8")
        mode = stat.S_IMODE((content / FILE_NAME).stat().st_mode)
        for name in files:  # safetensors makes files readable by their owner only
            (content / name).chmod(mode)
        temporary.move(content, folder)


def read(folder: Path) -> Manifest:
    """Return the folder's manifest; only its form is checked, no file is read. Raises InputError, IntegrityError."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    path = folder / FILE_NAME
    try:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise IntegrityError(f"{path}: not a regular file")
        with path.open("rb") as file:
            raw = file.read(MAXIMUM_BYTES + 1)
    except FileNotFoundError:
        raise IntegrityError(f"{path}: missing; this folder is not a numprune artifact, or it is incomplete") from None
    if len(raw) > MAXIMUM_BYTES:
        raise IntegrityError(f"{path}: exceeds the {MAXIMUM_BYTES:,}-byte limit")
    try:
        parsed = _Schema.model_validate(json.loads(raw, object_pairs_hook=_no_duplicates, parse_constant=_no_constant))
        files = {name: FileEntry(entry.sha256, entry.size) for name, entry in parsed.files.items()}
        manifest = Manifest(parsed.kind, files, parsed.parents, parsed.facts)
        digest = manifest.digest  # 1e999 is valid JSON and has no canonical form
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise IntegrityError(f"{path}: {where[:200]}: {first['msg'][:200]}") from None
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{path}: not a manifest: {error}") from None
    if digest != parsed.digest:
        raise IntegrityError(f"{path}: the digest of its content is {digest}, but it states {parsed.digest}")
    return manifest


def verify(folder: Path) -> Manifest:
    """Like `read`, and verify that exactly the listed files exist, with their sizes and digests.

    Raises IntegrityError naming the file.
    """
    manifest = read(folder)
    present = set(_walk(folder)) - {FILE_NAME}
    for name in sorted(manifest.files.keys() | present):
        if name not in present:
            raise IntegrityError(f"{folder / name}: missing, but listed in the manifest")
        if name not in manifest.files:
            raise IntegrityError(f"{folder / name}: not in the manifest")
        verify_file(folder / name, manifest.files[name])
    return manifest


def verify_file(path: Path, expected: FileEntry) -> None:
    """Raise IntegrityError unless the file has this size and digest."""
    size = path.stat().st_size
    if size != expected.size:
        raise IntegrityError(f"{path}: {size} bytes, but {expected.size} in the manifest")
    digest = sha256_file(path)
    if digest != expected.sha256:
        raise IntegrityError(f"{path}: its SHA-256 is {digest}, but {expected.sha256} in the manifest")


# --- the manifest's schema ------------------------------------------------------------------------


def _relative(name: str) -> str:
    plain = PurePosixPath(name)
    if (
        not name
        or "\0" in name
        or plain.is_absolute()
        or ".." in plain.parts
        or plain.as_posix() != name
        or name == "."
    ):
        raise ValueError(f"{name!r} is not a plain relative path")
    if name == FILE_NAME:
        raise ValueError("a manifest must not list itself")
    return name


_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    sha256: _Sha256
    size: Annotated[int, Field(ge=0)]


class _Schema(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    version: Annotated[Literal["numprune/manifest/1"], Field(alias="schema")]
    kind: str
    files: dict[Annotated[str, AfterValidator(_relative)], _Entry]
    parents: dict[str, str]
    facts: dict[str, JsonValue]
    digest: _Sha256


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key occurs twice in one object")
    return dict(pairs)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _digest(value: Any) -> str:
    return hashlib.sha256(_canonical(value).encode()).hexdigest()


# --- files ----------------------------------------------------------------------------------------


def _walk(folder: Path, *, follow_files: bool = False, skip_hidden: bool = False) -> list[str]:
    """Return the relative paths of all files below `folder`, sorted. Raises IntegrityError for links and devices."""
    names = []
    for where, folders, files in _walked(folder):
        if skip_hidden and Path(where) == folder:
            folders[:] = [name for name in folders if not name.startswith(".")]
            files = [name for name in files if not name.startswith(".")]
        for path in (Path(where) / name for name in folders):
            if path.is_symlink():  # os.walk lists it, but does not enter it
                raise IntegrityError(f"{path}: a link; only regular files and folders belong here")
        for path in (Path(where) / name for name in files):
            if not path.is_file() or (path.is_symlink() and not follow_files):
                raise IntegrityError(f"{path}: a link or device; only regular files and folders belong here")
            names.append(path.relative_to(folder).as_posix())
    return sorted(names)


def _walked(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    try:
        yield from os.walk(folder, onerror=_raise)
    except RecursionError:
        raise IntegrityError(f"{folder}: its folders are nested too deeply") from None


def _raise(error: OSError) -> None:
    raise error


def _entry(path: Path) -> FileEntry:
    return FileEntry(sha256_file(path), path.stat().st_size)
