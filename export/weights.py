"""The tensors in a folder's safetensors files."""

from collections.abc import Iterator, Mapping
from math import prod

import torch
from safetensors import safe_open
from torch import Tensor

from numprune.errors import IntegrityError
from numprune.export import headers
from numprune.export.headers import QuantizedHeader, TensorHeader
from numprune.quantization import Quantized, compressed_tensors

# By safetensors' names; `DTYPES`: of weights that are not quantized.
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, dtype) for name, dtype in headers.FLOATS.items()}
ALL_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, dtype) for name, dtype in headers.NAMES.items()}
SLAB_BYTES = 64 << 20  # of a large tensor that is processed in parts


def main_dtype(stored: Mapping[str, TensorHeader]) -> torch.dtype:
    """Return the data type of most of the bytes; quantized weights count with their compute data type."""
    return DTYPES[headers.main_dtype(stored)]


def dtypes_of(stored: Mapping[str, TensorHeader], tied: Mapping[str, str]) -> dict[str, torch.dtype]:
    """Return the data type of each tensor of a model derived from this one.

    Each tensor keeps its own; a bias that compensation may add has that of its matrix, and a tensor that is not `tied`
    any more that of the one which it equalled.
    """
    dtypes = {name: DTYPES[header.dtype] for name, header in stored.items()}
    dtypes = {name: dtypes[source] for name, source in tied.items() if source in dtypes} | dtypes
    matrices = {name: dtype for name, dtype in dtypes.items() if name.endswith(".weight")}
    return {name.removesuffix("weight") + "bias": dtype for name, dtype in matrices.items()} | dtypes


def stored_parts(stored: Mapping[str, TensorHeader]) -> dict[str, TensorHeader]:
    """Return the stored tensors, a quantized weight as its parts."""
    parts: dict[str, TensorHeader] = {}
    for name, header in stored.items():
        parts |= header.parts if isinstance(header, QuantizedHeader) else {name: header}
    return parts


def read_tensor(header: TensorHeader) -> Tensor:
    """Return the tensor, mapped: values are read from the file on use. A quantized weight is dequantized."""
    if isinstance(header, QuantizedHeader):
        return read_rows(header)
    with safe_open(header.file, "pt") as file:
        tensor: Tensor = file.get_tensor(header.name)
        return tensor


def read_finite(header: TensorHeader) -> Tensor:
    """Like `read_tensor`. Raises IntegrityError if the tensor contains NaN or infinity."""
    tensor = read_tensor(header)
    if not torch.isfinite(tensor).all():
        raise IntegrityError(f"{header.file}: {header.name} has values that are NaN or infinite")
    return tensor


def read_rows(header: TensorHeader, start: int = 0, stop: int | None = None) -> Tensor:
    """Return rows of the tensor's first dimension (by default all), read into memory in the stored data type.

    Raises IntegrityError if the file is truncated.
    """
    stop = header.rows if stop is None else stop
    if isinstance(header, QuantizedHeader):
        return read_quantized(header, start, stop).dequantized()
    row_bytes = header.bytes // max(header.rows, 1)
    shape = (stop - start, *header.shape[1:]) if header.shape else ()  # a scalar
    result = torch.empty(shape, dtype=ALL_DTYPES[header.dtype])
    target = result.flatten().view(torch.uint8).numpy().data
    with header.file.open("rb", buffering=0) as file:
        file.seek(header.offset + start * row_bytes)
        while target:
            read = file.readinto(target)
            if not read:
                raise IntegrityError(f"{header.file}: ends in the middle of a tensor: it was truncated while in use")
            target = target[read:]
    return result


def read_quantized(header: QuantizedHeader, start: int, stop: int) -> Quantized:
    """Return rows of a quantized matrix as stored. Raises IntegrityError."""
    values, scales = (read_rows(part, start, stop) for part in list(header.parts.values())[:2])
    if header.scheme.name == "w4a16":
        values = compressed_tensors.unpack(values, header.shape[1])
    return Quantized(header.scheme, values, scales.float())


def slabs(header: TensorHeader) -> Iterator[Tensor]:
    """Yield the tensor in slabs of rows, each of about `SLAB_BYTES`. Raises IntegrityError."""
    # Quantized weights are read as float32.
    size = prod(header.shape) * 4 if isinstance(header, QuantizedHeader) else header.bytes
    step = max(1, SLAB_BYTES * header.rows // max(size, 1))
    for start in range(0, max(header.rows, 1), step):
        yield read_rows(header, start, min(start + step, header.rows))
