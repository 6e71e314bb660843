"""Find images in folders, Parquet files and folders saved by `datasets`; images.py decodes them. Needs no torch."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from numprune import arrow
from numprune.errors import InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


@dataclass(frozen=True)
class Picture:
    """An encoded image. `label`: its class by name or index; None: it has none."""

    name: str
    source: Path | bytes
    label: object = None


def read_pictures(paths: Iterable[Path | str]) -> list[Picture]:
    """Return the images in folders and files, in order; within a folder, by name.

    The label of an image in a subfolder is the subfolder's name. A record of a .parquet file or saved dataset has the
    image in its field "image", encoded, and may have a "label".

    Raises:
        InputError: a path is missing or has no images, or an image is in two of them; names every such path.
    """
    given = [Path(path) for path in paths]
    require_distinct(given)
    pictures: list[Picture] = []
    problems: list[str] = []
    for path in given:
        try:
            pictures += _records(path) if _is_table(path) else _in_folder(path)
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError("; ".join(problems))
    require_distinct(picture.source for picture in pictures if isinstance(picture.source, Path))
    return pictures


def require_distinct(files: Iterable[Path]) -> None:
    """Raise InputError if a file or folder is there twice, also by another name: it would count twice."""
    first: dict[str, Path] = {}
    for file in files:
        where = os.path.realpath(file)
        if where in first:
            other = "" if first[where] == file else f", also as {first[where]}"
            raise InputError(f"{file}: given twice{other}; it would count twice, so omit one")
        first[where] = file


def files_of(folder: Path) -> list[Path]:
    """Return the images in a folder and its subfolders, which may be links, by name. Raises InputError."""

    def refuse(error: OSError) -> NoReturn:
        raise InputError(f"{error.filename}: cannot be read: {error.strerror}")

    links = [path for path in folder.glob("*") if path.is_symlink() and path.is_dir()]
    found = (
        Path(parent, name)
        for top in (folder, *links)
        for parent, _, names in os.walk(top, onerror=refuse)
        for name in names
    )
    return sorted(path for path in found if path.suffix.lower() in SUFFIXES and path.is_file())


def _is_table(path: Path) -> bool:
    return path.suffix.lower() == ".parquet" or arrow.is_dataset(path)


def _in_folder(path: Path) -> list[Picture]:
    if path.is_file():
        raise InputError(f"{path}: give the folder of the images, a .parquet file, or a folder saved by `datasets`")
    if not path.is_dir():
        raise InputError(f"{path}: no such folder of images")
    found = files_of(path)
    if not found:
        raise InputError(f"{path}: contains no images; supported are {', '.join(SUFFIXES)}")
    inside = [file.relative_to(path) for file in found]
    deep = next((file for file in inside if len(file.parts) > 2), None)
    if deep:
        raise InputError(f"{path}: {deep} is in a subfolder of a class; give a folder whose subfolders are the classes")
    return [
        Picture(str(name), file, name.parts[0] if len(name.parts) == 2 else None)
        for name, file in zip(inside, found, strict=True)
    ]


def _records(path: Path) -> list[Picture]:
    pictures = []
    for number, row in enumerate(arrow.rows(path, ("image", "label", "name"), needed=("image",)), start=1):
        image = row.get("image")
        content = image.get("bytes") if isinstance(image, dict) else image
        if not isinstance(content, bytes):
            raise InputError(
                f'{path}: row {number}: its "image" must hold an encoded image, or a struct with its "bytes"'
            )
        pictures.append(Picture(str(row.get("name", f"{path.name}:{number}")), content, row.get("label")))
    if not pictures:
        raise InputError(f"{path}: contains no images")
    return pictures
