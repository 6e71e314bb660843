"""GitHub's step summary: every command of the step appends to one file, limited to 1 MiB."""

import logging
import os
import re
from pathlib import Path

logger = logging.getLogger(__name__)

VARIABLE = "GITHUB_STEP_SUMMARY"
LIMIT_BYTES = 1 << 20

_NOTE_BYTES = 2000
_NAMED, _NAME_CHARACTERS = 10, 40  # names of omitted sections


def is_summary(path: Path) -> bool:
    """Whether the path is the summary file of the current step."""
    named = os.environ.get(VARIABLE)
    return bool(named) and path.resolve() == Path(str(named)).resolve()


def append(path: Path, page: str) -> None:
    """Append a page within the limit. Raises OSError."""
    with path.open("ab") as file:
        before = b"\n\n" if file.tell() else b""
        added = shortened(page, LIMIT_BYTES - file.tell() - len(before))
        if added:
            file.write(before + added)
        else:
            logger.warning("%s: GitHub's limit of 1 MiB is reached; the report is not appended", path)


def shortened(page: str, limit: int) -> bytes:
    """The page in UTF-8, within `limit` bytes: sections that do not fit are omitted and named in one line.

    The text before the first table, with the verdict, is always kept; the result is empty if even that does not fit.
    """
    whole = _encoded(page)
    if len(whole) <= limit:
        return whole
    verdict, *others = re.split(r"^(?=##? )", page, flags=re.MULTILINE)[1:]
    head, bar, gates = verdict.partition("\n| ")
    sections = [("Gates", bar + gates), *((other.partition("\n")[0].lstrip("# "), other) for other in others)]
    room = limit - _NOTE_BYTES - len(_encoded(head))
    if room < 0:
        return b""
    kept, left = head, []
    for name, section in sections:
        size = len(_encoded(section))
        if size > room:
            left.append(name[:_NAME_CHARACTERS])
        else:
            kept += section
            room -= size
    names = ", ".join(left[:_NAMED]) + (f" and {len(left) - _NAMED} more" if len(left) > _NAMED else "")
    return _encoded(f"{kept}\n\nOmitted to stay within GitHub's 1 MiB limit: {names}. The report is complete.\n")


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", errors="backslashreplace")  # JSON allows lone surrogates
