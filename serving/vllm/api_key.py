"""The API key that clients must send to a server.

It comes from a file or from the environment and goes to vLLM through the environment: a command line is visible to
every user of the machine and repeated in logs.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from numprune.errors import InputError

VARIABLE = "VLLM_API_KEY"  # read by vLLM's servers
OPTION = "--api-key-file"

_KEY = re.compile(r"[!-~]{1,4096}")  # allowed in an HTTP header


def read(file: Path | None = None) -> str | None:
    """The key from `file`, else from the environment, else None. Raises InputError."""
    where = f"{OPTION} {file}" if file else f"${VARIABLE}"
    try:
        text = file.read_text(encoding="ascii", errors="replace") if file else os.environ.get(VARIABLE)
    except OSError as error:
        raise InputError(f"{where}: cannot be read: {error.strerror}") from None
    if not text and file is None:
        return None
    key = str(text).strip()  # files end with a newline
    if not _KEY.fullmatch(key):
        raise InputError(f"{where}: not an API key; a key is one word of up to 4096 ASCII characters")
    return key


def headers(key: str | None) -> Mapping[str, str]:
    """Headers of a request to a server with this key."""
    return {"Authorization": f"Bearer {key}"} if key else {}


def refused(key: str | None) -> str:
    """The remedy if a server responds with 401 to this key."""
    return "it rejects the API key" if key else f"it requires an API key: set ${VARIABLE} or give {OPTION}"
