"""The budgets that a user writes: bytes of weights, the time of a step, bytes of KV cache, or several of these.

No tensor library is needed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from numprune import byte_budget
from numprune.cache_budget import is_kv, is_of_sequence, parse_kv, parse_sequence
from numprune.errors import InputError
from numprune.scenario import is_time, parse_time


@dataclass(frozen=True)
class Asked:
    """The limits of some budgets; None: no limit of this kind.

    Attributes:
        bytes: of all weights.
        time: as in scenario.py.
        kv: bytes of KV cache per token.
        sequence: bytes of KV cache of one sequence, and its tokens.
    """

    bytes: int | None = None
    time: str | None = None
    kv: int | None = None
    sequence: tuple[int, int] | None = None

    @property
    def sizes_by_ratio(self) -> bool:
        """Whether a ratio determines the sizes of blocks."""
        return (self.bytes, self.time, self.kv) == (None, None, None)


def parse_budgets(texts: Sequence[str]) -> Asked:
    """Return the limits of budgets as "6GiB", "20ms@decode,b=8,ctx=2048", "kv=64KiB/token" and "kv=8MiB@ctx=4096".

    Raises:
        InputError: a budget has another form, or two limit the same quantity.
    """
    found: dict[str, str] = {}
    limits: dict[str, int] = {}
    sequence = None
    for text in texts:
        if is_of_sequence(text):
            kind, sequence = "sequence", parse_sequence(text)
        elif is_kv(text):
            kind, limits["kv"] = "kv", parse_kv(text)
        elif is_time(text):
            parse_time(text)
            kind = "time"
        else:
            kind, limits["bytes"] = "bytes", byte_budget.parse(text)
        if kind in found:
            raise InputError(
                f"budget: {found[kind]!r} and {text[:80]!r} limit the same quantity; leave one of them out"
            )
        found[kind] = text
    return Asked(limits.get("bytes"), found.get("time"), limits.get("kv"), sequence)
