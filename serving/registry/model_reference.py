"""References to versions: NAME, NAME@ALIAS or NAME/VERSION."""

import re
from dataclasses import dataclass

from numprune.errors import InputError

CANDIDATE = "candidate"  # the newest release that passed its gate
PRODUCTION = "production"

_NAME = re.compile(r"\w[\w.-]{0,199}")
_ALIAS = re.compile(r"[A-Za-z][\w-]{0,99}")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")


@dataclass(frozen=True)
class ModelReference:
    """A model name with an alias or a version."""

    name: str
    alias: str | None
    version: int | None

    def __str__(self) -> str:
        return f"{self.name}/{self.version}" if self.alias is None else f"{self.name}@{self.alias}"


def parse(text: str, default_alias: str = PRODUCTION) -> ModelReference:
    """Parse a reference; a bare NAME means `default_alias`. Raises InputError."""
    if "@" in text:
        name, _, alias = text.partition("@")
        if _ALIAS.fullmatch(alias):
            return ModelReference(check_name(name), alias, None)
    elif "/" in text:
        name, _, version = text.partition("/")
        if _VERSION.fullmatch(version):
            return ModelReference(check_name(name), None, int(version))
    else:
        return ModelReference(check_name(text), default_alias, None)
    raise InputError(f"{text!r}: not a reference; it must be NAME, NAME@ALIAS or NAME/VERSION (a whole number)")


def check_name(name: str) -> str:
    """Return the name. Raises InputError if it is not a valid model name."""
    if not _NAME.fullmatch(name):
        raise InputError(f"{name!r}: not a valid model name; use at most 200 letters, digits, '_', '-' and '.'")
    return name
