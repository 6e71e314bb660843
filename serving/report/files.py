"""Reads and writes report.json."""

import json
import os
import secrets
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from numprune.errors import InputError, IntegrityError
from numprune.serving.problems import problems
from numprune.serving.report.models import SCHEMA, SCHEMA_1, Report, upgraded

MAXIMUM_BYTES = 64 << 20  # checked before anything is parsed


def write(report: Report, path: Path) -> None:
    """Write `path` whole or not at all; an existing file is replaced."""
    replace(path, json.dumps(report.to_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def replace(path: Path, text: str) -> None:
    """Write `path` atomically; an existing file is replaced. Raises OSError, and then nothing has changed."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        # A lone surrogate, which JSON allows and UTF-8 does not, is written as its escape.
        with beside.open("x", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def read(path: Path) -> Report:
    """Read a report; schema 1 is upgraded. Raises InputError (no such file), IntegrityError (not a report)."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAXIMUM_BYTES + 1)
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(f"{path}: no such report; give the report.json that `numprune optimize` writes") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    if len(raw) > MAXIMUM_BYTES:
        raise IntegrityError(f"{path}: exceeds the {MAXIMUM_BYTES:,}-byte limit")
    try:
        data = json.loads(raw, **_STRICT)
        if isinstance(data, dict) and data.get("schema") not in (SCHEMA, SCHEMA_1):
            raise IntegrityError(
                f"{path}: schema: {data.get('schema')!r}; this version reads {SCHEMA!r} and {SCHEMA_1!r}"
            )
        is_old = isinstance(data, dict) and data["schema"] == SCHEMA_1
        return upgraded(data) if is_old else Report.model_validate(data)
    except ValidationError as error:
        raise IntegrityError(f"{path}: not a report: {problems(error)}") from None
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{path}: not a report: {error}") from None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("an object has a duplicate key")
    return dict(pairs)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _sized(digits: str) -> int:
    if len(digits) > 20:  # beyond 64 bits: no real figure is as large, and arithmetic with it raises
        raise ValueError(f"{digits[:20]}… is too large")
    return int(digits)


_STRICT: dict[str, Any] = {"object_pairs_hook": _no_duplicates, "parse_constant": _no_constant, "parse_int": _sized}
