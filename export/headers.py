"""The headers of a folder's safetensors files, read without the data. torch is not needed."""

import json
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePosixPath

from safetensors import SafetensorError, safe_open

from numprune import dtypes
from numprune.errors import InputError, IntegrityError
from numprune.export import files
from numprune.export.compressed_tensors import quantization_in
from numprune.quantization import Scheme, compressed_tensors

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# Data types: safetensors' name -> torch's. Integer types are those of quantized weights.
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
NAMES = FLOATS | {"I8": "int8", "F8_E4M3": "float8_e4m3fn", "I32": "int32", "I64": "int64"}
# What names of buffers end with that older versions of transformers stored, as whole numbers or booleans: position ids,
# causal masks of GPT-2 and GPT-NeoX, and places in windows of Swin.
_BUFFERS = ("position_ids", ".attn.bias", ".attention.bias", ".relative_position_index")
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
_MAXIMUM_INDEX_BYTES = 64 << 20  # checked before it is parsed
_CHUNK_BYTES = 16 << 20  # of a large tensor that is processed in parts


@dataclass(frozen=True)
class TensorHeader:
    """One stored tensor: its shape, its data type in safetensors' spelling (`F32`, `BF16`, …) and its location.

    `name`: in `file`; `offset`: of its first byte there.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path
    offset: int

    @property
    def rows(self) -> int:
        """Size of the first dimension; 1 for a scalar."""
        return self.shape[0] if self.shape else 1

    @property
    def bytes(self) -> int:
        return prod(self.shape) * dtypes.BYTES[NAMES[self.dtype]]

    @property
    def is_float(self) -> bool:
        """Whether it is stored in floating point, not as quantized values."""
        return self.dtype in FLOATS


@dataclass(frozen=True)
class QuantizedHeader(TensorHeader):
    """A quantized matrix, stored as grid values and scales; it is read dequantized, in float32.

    Attributes:
        dtype: of the unquantized tensors, in which its products are computed.
        scheme: of the grid.
        parts: the stored tensors by name.
    """

    scheme: Scheme
    parts: Mapping[str, TensorHeader]

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts.values())


def has_weights(folder: Path) -> bool:
    return (folder / INDEX).exists() or (folder / SINGLE).exists()


def read_headers(folder: Path) -> dict[str, TensorHeader]:
    """Return the header of every stored weight by name. The data are not read, but each file must be long enough.

    Raises:
        InputError: there are no safetensors weights, or both a single file and shards, or quantized tensors.
        IntegrityError: a file is missing or truncated, or the index and the shards contradict each other.
    """
    if (folder / INDEX).exists():
        if (folder / SINGLE).exists():
            raise InputError(f"{folder}: has both {SINGLE} and {INDEX}; remove the stale one")
        return _joined(folder, _renamed(_read_shards(folder)))
    if not (folder / SINGLE).is_file():
        other = ", ".join(sorted(path.name for path in folder.glob("*") if path.suffix in _PICKLES)[:3])
        hint = f"; convert {other} with `save_pretrained`: reading such a file may run code" if other else ""
        raise InputError(f"{folder}: has neither {SINGLE} nor {INDEX}{hint}")
    return _joined(folder, _renamed(_read_file(folder / SINGLE)))


def _joined(folder: Path, stored: dict[str, TensorHeader]) -> dict[str, TensorHeader]:
    """Merge the stored tensors of each quantized weight into one header. Raises InputError, IntegrityError."""
    config = quantization_in(folder) if (folder / files.CONFIG).exists() else None
    if config is not None:
        stored = dict(stored)
        dtype = main_dtype(stored)
        for scale in [name for name in stored if name.endswith(".weight_scale")]:
            linear = scale.removesuffix(".weight_scale")
            scheme = config.scheme(linear)
            if scheme is None:
                raise IntegrityError(
                    f"{stored[scale].file}: {scale} is stored, but quantization_config in config.json leaves {linear} "
                    "unquantized; they do not belong together"
                )
            matrix = _quantized_header(f"{linear}.weight", stored, scheme, dtype)
            for part in matrix.parts:
                del stored[part]
            stored[matrix.name] = matrix
    for name, header in stored.items():
        if not header.is_float:
            linear, _, ending = name.rpartition(".")
            scheme = config.scheme(linear) if config else None
            if scheme is not None and ending in compressed_tensors.endings(scheme):
                raise IntegrityError(
                    f"{header.file}: {name} is stored as {header.dtype}, but {linear}.weight_scale is missing"
                )
            raise InputError(
                f"{header.file}: {name} is stored as {header.dtype}; only {', '.join(FLOATS)} are supported "
                f"where config.json has no {compressed_tensors.CONFIG_FIELD} for it (prune the unquantized model)"
            )
    return stored


def _quantized_header(name: str, stored: Mapping[str, TensorHeader], scheme: Scheme, dtype: str) -> QuantizedHeader:
    """Return the header of the weight `name`. Raises IntegrityError."""
    path = name.removesuffix("weight")
    try:
        parts = {path + ending: stored[path + ending] for ending in compressed_tensors.endings(scheme)}
    except KeyError as error:
        raise IntegrityError(f"{stored[f'{name}_scale'].file}: {error.args[0]} is missing") from None
    values, scales, *_ = parts.values()
    shape = values.shape
    if scheme.name == "w4a16":
        said = parts[f"{name}_shape"]
        shape = _integers(said) if said.shape == (2,) and said.dtype == "I64" else ()
    if len(shape) != 2 or min(shape) < 1 or shape[1] % (scheme.group_size or 1):
        raise IntegrityError(f"{values.file}: {name} has shape {list(shape)}, which {scheme} cannot have")
    wanted = compressed_tensors.shapes_of(name, scheme, shape)
    by_torch = {torch_name: stored_name for stored_name, torch_name in NAMES.items()}
    wanted_dtypes = compressed_tensors.dtypes_of(name, scheme, dtypes.DEFAULT)
    for part, header in parts.items():
        dtype_wanted = by_torch[wanted_dtypes[part]]
        fits = header.is_float if header is scales else header.dtype == dtype_wanted
        if header.shape != wanted[part] or not fits:
            dtype_wanted = "one of " + ", ".join(FLOATS) if header is scales else dtype_wanted
            raise IntegrityError(
                f"{header.file}: {part} is {header.dtype} {list(header.shape)}, where {scheme} has {dtype_wanted} "
                f"{list(wanted[part])}"
            )
    return QuantizedHeader(name, shape, dtype, values.file, values.offset, scheme, parts)


def _integers(header: TensorHeader) -> tuple[int, ...]:
    """Return the values of a tensor of 64-bit integers."""
    with header.file.open("rb") as file:
        file.seek(header.offset)
        return struct.unpack(f"<{header.rows}q", file.read(header.bytes))


def _renamed(stored: dict[str, TensorHeader]) -> dict[str, TensorHeader]:
    return {current_name(name): header for name, header in stored.items()}


def current_name(name: str) -> str:
    """Return a tensor's current name in transformers; the first BERT checkpoints name norms as in TensorFlow."""
    for old, new in (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")):
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def weight_bytes(folder: Path) -> int:
    """Return the bytes of all stored tensors, on disk and, in their own data type, in memory."""
    return sum(header.bytes for header in read_headers(folder).values())


def equal(one: TensorHeader, other: TensorHeader) -> bool:
    """Return whether two tensors are stored with equal bytes. Raises IntegrityError if a file is truncated."""
    if isinstance(one, QuantizedHeader) and isinstance(other, QuantizedHeader):
        pairs = zip(one.parts.values(), other.parts.values(), strict=False)
        return one.scheme == other.scheme and all(equal(*pair) for pair in pairs)
    alike = type(one) is type(other) and (one.dtype, one.shape) == (other.dtype, other.shape)
    return alike and all(map(bytes.__eq__, _chunks(one), _chunks(other)))


def _chunks(header: TensorHeader) -> Iterator[bytes]:
    with header.file.open("rb") as file:
        file.seek(header.offset)
        left = header.bytes
        while left:
            chunk = file.read(min(left, _CHUNK_BYTES))
            if not chunk:
                raise IntegrityError(f"{header.file}: ends in the middle of a tensor: it was truncated while in use")
            left -= len(chunk)
            yield chunk


def main_dtype(stored: Mapping[str, TensorHeader]) -> str:
    """Return the data type of most of the bytes, by safetensors' name; of quantized weights, that of products."""
    sizes = Counter(dict.fromkeys(FLOATS, 0))
    for header in stored.values():
        if header.is_float:
            sizes[header.dtype] += header.bytes
    return sizes.most_common(1)[0][0]


def _read_file(path: Path) -> dict[str, TensorHeader]:
    headers = {}
    try:
        # With "pt", the whole file would be mapped writable and count towards a memory limit.
        with safe_open(path, "np") as file:
            offsets = _offsets(path)
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                part = file.get_slice(name)
                if _is_buffer(name, part.get_dtype()):
                    continue
                headers[name] = TensorHeader(name, tuple(part.get_shape()), part.get_dtype(), path, offsets[name])
    except (SafetensorError, OSError) as error:
        raise IntegrityError(f"{path}: not a complete safetensors file: {error}") from None
    for name, header in headers.items():
        if header.dtype not in NAMES:
            raise InputError(f"{path}: {name} is stored as {header.dtype}; only {', '.join(FLOATS)} are supported")
    return headers


def _is_buffer(name: str, dtype: str | None = None) -> bool:
    """Return whether a tensor, of this data type if it is known, is one of `_BUFFERS`."""
    return name.endswith(_BUFFERS) and dtype not in FLOATS


def _offsets(path: Path) -> dict[str, int]:
    """Return the offset of each tensor's first byte in a file that `safe_open` has accepted."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length))
    return {name: 8 + length + entry["data_offsets"][0] for name, entry in entries.items() if name != "__metadata__"}


def _read_shards(folder: Path) -> dict[str, TensorHeader]:
    weight_map = _read_index(folder / INDEX)
    headers: dict[str, TensorHeader] = {}
    for shard in sorted(set(weight_map.values())):
        if not (folder / shard).is_file():
            raise IntegrityError(f"{folder / shard}: missing, but named in {INDEX}")
        for name, header in _read_file(folder / shard).items():
            if weight_map.get(name) != shard:
                raise IntegrityError(f"{folder / shard}: contains {name}, which {INDEX} does not list")
            headers[name] = header
    absent = sorted(name for name in weight_map.keys() - headers.keys() if not _is_buffer(name))
    if absent:
        raise IntegrityError(f"{folder / weight_map[absent[0]]}: lacks {absent[0]}, which {INDEX} lists")
    return headers


def _read_index(path: Path) -> Mapping[str, str]:
    try:
        with path.open("rb") as file:
            raw = file.read(_MAXIMUM_INDEX_BYTES + 1)
        if len(raw) > _MAXIMUM_INDEX_BYTES:
            raise IntegrityError(f"{path}: exceeds the {_MAXIMUM_INDEX_BYTES:,}-byte limit")
        weight_map = json.loads(raw)["weight_map"]
        names = set(weight_map.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise IntegrityError(f"{path}: not an index of shards: {str(error)[:200]}") from None
    for name in names:
        if not isinstance(name, str) or PurePosixPath(name).name != name or not name.endswith(".safetensors"):
            raise IntegrityError(f"{path}: {name!r} is not the name of a safetensors file in this folder")
    return weight_map
