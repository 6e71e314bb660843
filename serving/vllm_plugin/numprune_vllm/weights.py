"""Weights passed to vLLM, each compared with the configuration first.

vLLM's loaders silently truncate tensors that are too large, cast other data types (quantized integers to floating
point), leave missing parts of a fused matrix uninitialized, and drop biases that they do not expect. Such tensors are
refused here first.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from numprune_vllm.sizes import FLOATS, Expected

# The data types of `Expected`, by safetensors' names.
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.bool: "BOOL",
}
INDEX = "model.safetensors.index.json"


class _Count:
    """The expected tensors seen so far."""

    def __init__(self, expected: Expected) -> None:
        self._shapes, self._tied, self._dtypes = expected.shapes, expected.tied, expected.dtypes
        self._seen: set[str] = set()

    def add(self, name: str, shape: tuple[int, ...], dtype: str) -> None:
        """Count a tensor; `dtype` as safetensors names it.

        Raises ValueError: it is unexpected, duplicate, or has another shape or data type.
        """
        if name not in self._shapes:
            raise ValueError(f"{name}: stored, but the model that config.json describes has no such tensor")
        if shape != self._shapes[name]:
            raise ValueError(
                f"{name}: stored with shape {list(shape)}, but config.json implies {list(self._shapes[name])}"
            )
        allowed = [_DTYPES[one] for one in self._dtypes.get(name, FLOATS)]
        if dtype not in allowed:
            raise ValueError(
                f"{name}: stored as {dtype}, but config.json implies {' or '.join(allowed)}; the two are of different "
                "checkpoints: export again with `numprune export --to vllm`"
            )
        if name in self._seen:
            raise ValueError(f"{name}: stored twice")
        self._seen.add(name)

    def finish(self) -> None:
        """Raises ValueError if one is missing."""
        # One of two tied tensors is enough.
        tied = {name for name, other in self._tied.items() if other in self._seen}
        missing = sorted(self._shapes.keys() - self._seen - tied)
        if missing:
            raise ValueError(
                f"{missing[0]} {list(self._shapes[missing[0]])}: not stored, but config.json needs it"
                + (f" ({len(missing) - 1} more are missing)" if len(missing) > 1 else "")
            )


def checked(weights: Iterable[tuple[str, Tensor]], expected: Expected) -> Iterator[tuple[str, Tensor]]:
    """Pass on `weights`, which must be exactly the `expected` ones, each once, in any order.

    A tied output matrix may be absent; if present, it must equal the embedding and is not passed on.

    Raises:
        ValueError: names the tensor that is unexpected, missing, duplicate, or has another shape or data type.
    """
    count = _Count(expected)
    sources = {source: name for name, source in expected.tied.items()}
    twins: dict[str, Tensor] = {}
    for name, tensor in weights:
        if expected.ignores(name):
            continue
        count.add(name, tuple(tensor.shape), _DTYPES.get(tensor.dtype, str(tensor.dtype)))
        source = expected.tied.get(name, name)
        if source in sources and not twins.setdefault(source, tensor).equal(tensor):
            raise ValueError(f"{sources[source]}: differs from {source}, but config.json ties them")
        if name in expected.tied:
            continue
        yield name, tensor
    count.finish()


def audit(folder: Path, expected: Expected) -> None:
    """Compare the headers of a checkpoint's safetensors files with the `expected` tensors; nothing is loaded.

    Raises:
        ValueError: like `checked`, or there are no such files.
    """
    count = _Count(expected)
    for file in _files(folder):
        with safe_open(file, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118 (not a mapping)
                if not expected.ignores(name):
                    found = stored.get_slice(name)
                    count.add(name, tuple(found.get_shape()), found.get_dtype())
    count.finish()


def _files(folder: Path) -> list[Path]:
    """The files that vLLM reads: those in the index if there is one."""
    index = folder / INDEX
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name]
        if outside:
            raise ValueError(f"{index}: {outside[0]!r} is not a file name in this folder")
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder}: no safetensors files in this folder")
    return files
