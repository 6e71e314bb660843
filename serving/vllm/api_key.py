"""The key that a server asks its clients for.

It comes from a file or from the environment and goes to vLLM through the environment: a command line is seen by every
user of the machine, and repeated in logs.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from numprune.errors import InputError

VARIABLE = "VLLM_API_KEY"  # vLLM's servers read it by themselves
OPTION = "--api-key-file"

_KEY = re.compile(r"[!-~]{1,4096}")  # what an HTTP header can carry


def read(file: Path | None = None) -> str | None:
    """The key in `file`; without one, that of the environment; None when neither is given. Raises InputError."""
    where = f"{OPTION} {file}" if file else f"${VARIABLE}"
    try:
        text = file.read_text(encoding="ascii", errors="replace") if file else os.environ.get(VARIABLE)
    except OSError as error:
        raise InputError(f"{where}: cannot be read: {error.strerror}") from None
    if not text and file is None:
        return None
    key = str(text).strip()  # files end with a line break
    if not _KEY.fullmatch(key):
        raise InputError(f"{where}: not an API key; a key is one word of up to 4096 ASCII characters")
    return key


def headers(key: str | None) -> Mapping[str, str]:
    """What a request carries to a server with this key."""
    return {"Authorization": f"Bearer {key}"} if key else {}


def refused(key: str | None) -> str:
    """What to do when a server answers 401 to a request with this key."""
    return "it refuses the API key" if key else f"it wants an API key: set ${VARIABLE} or give {OPTION}"
