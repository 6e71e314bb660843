"""Write weights tensor by tensor into safetensors shards, so that written tensors can leave memory."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from numprune.export.headers import INDEX, SINGLE
from numprune.export.precision import cast
from numprune.export.weights import ALL_DTYPES, DTYPES

_NAMES = {dtype: name for name, dtype in ALL_DTYPES.items()}
_METADATA = {"format": "pt"}  # transformers refuses files without this
SHARD_BYTES = 5 * 10**9
_ENTRY_BYTES = 200  # upper limit of a tensor's header entry, without its name


class ShardWriter:
    """Writes tensors. Space for a file's header is reserved at its start; the header is written last.

    Args:
        folder: for the shards alone while they are written; it must not contain model*.safetensors.
        dtypes: the data type of every tensor that may be written; the header needs room for all.
        shard_bytes: a shard that would exceed this size is closed, unless it holds a single tensor.
    """

    def __init__(self, folder: Path, dtypes: Mapping[str, torch.dtype], shard_bytes: int) -> None:
        self._folder = folder
        self._dtypes = dtypes
        self._shard_bytes = shard_bytes
        room = sum(len(json.dumps(name)) + _ENTRY_BYTES for name in dtypes) + len(json.dumps(_METADATA)) + 100
        self._header_bytes = -(-room // 8) * 8
        self._file: BinaryIO | None = None
        self._entries: dict[str, dict[str, Any]] = {}  # of the open shard
        self._filled = 0  # bytes of data in it
        self._weight_map: dict[str, int] = {}  # tensor -> its shard, from 1
        self._shards = 0
        self._values = 0  # total bytes
        self._bytes = 0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Write each tensor under its name. Raises IntegrityError like `add_slabs`."""
        for name, tensor in tensors.items():
            self.add_slabs(name, tensor.shape, [tensor])

    def add_slabs(self, name: str, shape: Iterable[int], slabs: Iterable[Tensor]) -> None:
        """Write one tensor, given in slabs of rows.

        Raises IntegrityError if a value is not finite, before or after the cast.
        """
        if name in self._weight_map:
            raise ValueError(f"{name} was written already")
        if name not in self._dtypes:
            raise ValueError(f"{name} was not declared, so the header has no entry for it")
        shape = list(shape)
        dtype = self._dtypes[name]
        values = torch.Size(shape).numel()
        size = values * dtype.itemsize
        if self._file is not None and self._filled + size > self._shard_bytes:
            self._close_shard()
        file = self._file or self._open_shard()
        written = 0
        for slab in slabs:
            # Quantized values are written unchanged.
            cast_slab = cast(name, slab, dtype) if _NAMES[dtype] in DTYPES else slab.cpu()
            written += file.write(_bytes(cast_slab))
        if written != size:
            raise ValueError(f"{name} {shape} has {size} bytes, not {written}")
        entry = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [self._filled, self._filled + size]}
        self._entries[name] = entry
        self._filled += size
        self._values += values
        self._bytes += size
        self._weight_map[name] = self._shards

    def close(self) -> None:
        """Write the last header, give the files their standard names, and write an index if there are several."""
        self._close_shard()
        if self._shards == 1:
            self._partial(1).rename(self._folder / SINGLE)
            return
        files = {shard: f"model-{shard:05}-of-{self._shards:05}.safetensors" for shard in range(1, self._shards + 1)}
        for shard, file in files.items():
            self._partial(shard).rename(self._folder / file)
        metadata = {"total_parameters": self._values, "total_size": self._bytes}
        index = {"metadata": metadata, "weight_map": {name: files[shard] for name, shard in self._weight_map.items()}}
        (self._folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def abandon(self) -> None:
        """Close the open file without finishing it."""
        if self._file is not None:
            self._file.close()

    def _open_shard(self) -> BinaryIO:
        self._shards += 1
        self._file = self._partial(self._shards).open("xb")
        self._file.seek(8 + self._header_bytes)
        return self._file

    def _close_shard(self) -> None:
        if self._file is None:
            raise ValueError("nothing was written")
        header = json.dumps({"__metadata__": _METADATA, **self._entries}).encode()
        self._file.seek(0)
        self._file.write(self._header_bytes.to_bytes(8, "little") + header.ljust(self._header_bytes))
        self._file.close()
        self._file, self._entries, self._filled = None, {}, 0

    def _partial(self, shard: int) -> Path:
        return self._folder / f"shard-{shard}"


@contextmanager
def writing(folder: Path, dtypes: Mapping[str, torch.dtype], shard_bytes: int = SHARD_BYTES) -> Iterator[ShardWriter]:
    """Yield a writer that is closed on a clean exit and abandoned if the body raises."""
    writer = ShardWriter(folder, dtypes, shard_bytes)
    try:
        yield writer
        writer.close()
    finally:
        writer.abandon()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data
