"""Data types by name: torch's names, as config.json has them. torch itself is not needed."""

import sys
from typing import Any

from numprune.errors import InputError

BYTES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "int64": 8,
    "int32": 4,
    "int8": 1,
}
DEFAULT = "float32"


def name_of(dtype: object) -> str:
    """`torch.bfloat16` -> "bfloat16"; None -> "float32", which transformers uses if a configuration names none."""
    return DEFAULT if dtype is None else str(dtype).removeprefix("torch.")


def bytes_of(dtype: object) -> int:
    """Return the bytes of a value. Raises InputError where a configuration names a data type that weights cannot have.

    Args:
        dtype: of a configuration: torch's, its name, or None.
    """
    name = name_of(dtype)
    if name not in BYTES:
        raise InputError(f"dtype={name[:80]}; it must be one of {', '.join(BYTES)}")
    return BYTES[name]


def in_config(name: str) -> Any:
    """Return the data type of this name as transformers' configurations have it: torch's, or the name without torch."""
    torch = sys.modules.get("torch")  # transformers imports it where it can
    return getattr(torch, name) if torch else name
