"""Read images as codes from arrays: .npy files and safetensors. torch is not needed."""

from collections.abc import Iterator
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from numprune.errors import InputError

SUFFIXES = (".npy", ".safetensors")

# KeyError, TypeError: bfloat16. EOFError: an empty file. The others: headers that are no Python or state huge sizes.
_UNREADABLE = (
    OSError,
    ValueError,
    SafetensorError,
    KeyError,
    TypeError,
    EOFError,
    SyntaxError,
    TokenError,
    MemoryError,
    OverflowError,
)


def records(file: Path) -> Iterator[dict[str, Any]]:
    """Yield a record for each image of a file: `codes` and, if the file has classes, `label`.

    A .npy file is an array (images, codes); a safetensors file has the tensor `codes` and perhaps `labels` (images,).
    Raises InputError.
    """
    labels = None
    try:
        if file.suffix.lower() == ".npy":
            codes = np.load(file, allow_pickle=False)
        else:
            tensors = load_file(file)
            codes, labels = tensors.get("codes"), tensors.get("labels")
    except FileNotFoundError:
        raise InputError(f"{file}: does not exist") from None
    except _UNREADABLE as error:
        raise InputError(f"{file}: cannot be read: {str(error)[:200]}") from None
    if isinstance(codes, np.lib.npyio.NpzFile):
        codes.close()
        raise InputError(f"{file}: is an .npz archive; save its array with numpy.save")
    if codes is None:
        raise InputError(f"{file}: has no tensor 'codes'; it must be integers (images, codes)")
    _require(file, "codes", codes, 2)
    if labels is not None:
        _require(file, "labels", labels, 1)
        if len(labels) != len(codes):
            raise InputError(f"{file}: has {len(labels)} labels for {len(codes)} images")
    for index, row in enumerate(codes.tolist()):
        yield {"codes": row} if labels is None else {"codes": row, "label": int(labels[index])}


def _require(file: Path, name: str, array: np.ndarray, dimensions: int) -> None:
    if array.ndim != dimensions or not np.issubdtype(array.dtype, np.integer):
        shape = "(images, codes)" if dimensions == 2 else "(images,)"
        raise InputError(f"{file}: {name} are {array.dtype} {list(array.shape)}; they must be integers {shape}")
