"""Checks of fields of a configuration, which may come from an untrusted file."""

from typing import Any

from numprune.errors import InputError

_LARGEST = 2**31


def require_sizes(config: Any, *names: str, where: str = "", optional: bool = False) -> None:
    """Raise InputError unless each of these fields is a positive whole number, or optional and missing."""
    for name in names:
        value = getattr(config, name, None)
        if value is None and optional:
            continue
        if not is_size(value):
            raise InputError(f"{where}{name}={str(value)[:80]}; it must be a positive integer")


def is_size(value: object) -> bool:
    """Return whether a value is a positive whole number, and not absurdly large."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < _LARGEST


def pair(config: Any, field: str) -> tuple[int, int]:
    """Return height and width. Raises InputError unless the field is a positive whole number, or two of them."""
    found: Any = getattr(config, field, None)
    height, width = found if isinstance(found, list | tuple) and len(found) == 2 else (found, found)
    if not all(type(size) is int and 0 < size < 2**16 for size in (height, width)):
        raise InputError(f"{field}={str(found)[:80]}; it must be a positive integer, or two: height and width")
    return height, width
