"""What the safetensors files of a folder say they hold, read from their headers alone."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open

from numprune.errors import InputError, IntegrityError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class TensorHeader:
    """One stored tensor: its shape, its data type as safetensors writes it (`F32`, `BF16`, …), and its file."""

    shape: tuple[int, ...]
    dtype: str
    file: Path

    @property
    def bytes(self) -> int:
        count = _BYTES[self.dtype]
        for size in self.shape:
            count *= size
        return count


def read_headers(folder: Path) -> dict[str, TensorHeader]:
    """Every stored tensor by name. The data are not read, but each file must be long enough to hold them.

    Raises:
        InputError: there are no safetensors weights, or both a single file and shards, or quantized tensors.
        IntegrityError: a file is missing or truncated, or the index and the shards contradict each other.
    """
    if (folder / INDEX).exists():
        if (folder / SINGLE).exists():
            raise InputError(f"{folder}: has both {SINGLE} and {INDEX}; remove the one that is stale")
        return _read_shards(folder)
    if not (folder / SINGLE).is_file():
        other = ", ".join(sorted(path.name for path in folder.glob("*.bin"))[:3])
        hint = f"; convert {other} with `save_pretrained`" if other else ""
        raise InputError(f"{folder}: neither {SINGLE} nor {INDEX} is there{hint}")
    return _read_file(folder / SINGLE)


def weight_bytes(folder: Path) -> int:
    """Bytes of all stored tensors: what the weights need on disk and, in their own data type, in memory."""
    return sum(header.bytes for header in read_headers(folder).values())


def read_tensor(header: TensorHeader, name: str) -> Any:
    """The tensor itself."""
    with safe_open(header.file, "pt") as file:
        return file.get_tensor(name)


def _read_file(path: Path) -> dict[str, TensorHeader]:
    headers = {}
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                part = file.get_slice(name)
                headers[name] = TensorHeader(tuple(part.get_shape()), part.get_dtype(), path)
    except (SafetensorError, OSError) as error:
        raise IntegrityError(f"{path}: not a whole safetensors file: {error}") from None
    for name, header in headers.items():
        if header.dtype not in _BYTES:
            raise InputError(
                f"{path}: {name} is stored as {header.dtype}; only {', '.join(_BYTES)} are supported "
                "(prune the unquantized model)"
            )
    return headers


def _read_shards(folder: Path) -> dict[str, TensorHeader]:
    weight_map = _read_index(folder / INDEX)
    headers: dict[str, TensorHeader] = {}
    for shard in sorted(set(weight_map.values())):
        if not (folder / shard).is_file():
            raise IntegrityError(f"{folder / shard}: missing, but named in {INDEX}")
        for name, header in _read_file(folder / shard).items():
            if weight_map.get(name) != shard:
                raise IntegrityError(f"{folder / shard}: holds {name}, which {INDEX} does not say")
            headers[name] = header
    absent = sorted(weight_map.keys() - headers.keys())
    if absent:
        raise IntegrityError(f"{folder / weight_map[absent[0]]}: lacks {absent[0]}, which {INDEX} says it holds")
    return headers


def _read_index(path: Path) -> Mapping[str, str]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names = set(weight_map.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{path}: not an index of shards: {error!r}") from None
    for name in names:
        if not isinstance(name, str) or PurePosixPath(name).name != name or not name.endswith(".safetensors"):
            raise IntegrityError(f"{path}: {name!r} is not the name of a safetensors file in this folder")
    return weight_map
