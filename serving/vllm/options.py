"""vLLM options given by the user that affect numprune."""

import argparse
import re
from collections.abc import Iterable, Sequence

from numprune.errors import InputError

_NAMES = "--served-model-name"
_SPELLINGS = re.compile(r"^--served[\w-]*")  # vLLM also accepts underscores and unambiguous abbreviations


def split_names(options: Sequence[str], default: str) -> tuple[list[str], list[str]]:
    """The served model names, and the other options.

    The names are those of `--served-model-name`, or `default`. vLLM puts the first one into its answers.

    Raises InputError when `--served-model-name` has no name.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(_NAMES, dest="names", nargs="+", default=[default])
    try:
        found, others = parser.parse_known_args([_SPELLINGS.sub(_NAMES, option, count=1) for option in options])
    except argparse.ArgumentError as error:
        raise InputError(f"{_NAMES}: {error.message}") from None
    return found.names, others


def taken(option: str, reserved: Iterable[str]) -> str | None:
    """The reserved option that a word is, in any spelling that vLLM accepts."""
    name = option.partition("=")[0].replace("_", "-")
    return next((one for one in reserved if name.startswith("-") and one.startswith(name)), None)
