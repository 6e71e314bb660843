"""A budget of bytes: the size limit of the stored weights, and the storage formats of blocks.

No tensor library is needed.
"""

import re
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Annotated, Literal

from pydantic import Field

from numprune.errors import InputError

SchemeName = Literal["fp8", "w8a8", "w4a16"]
ValueBytes = Literal[2, 4, 8]
MIXED = "mixed"  # a scheme for each block
# The choices of a budget for each block, by the requested scheme; None: the stored precision.
LEVELS: dict[str, tuple[SchemeName | None, ...]] = {
    "none": (None,),
    "fp8": ("fp8",),
    "w8a8": ("w8a8",),
    "w4a16": ("w4a16",),
    MIXED: (None, "w8a8", "w4a16"),
}
_UNITS = {"B": 1} | {
    f"{prefix}{ending}": base ** (power + 1)
    for base, ending in ((1000, "B"), (1024, "iB"))
    for power, prefix in enumerate("KMGT")
}
_BYTES = re.compile(r"(\d{1,15}(?:\.\d{1,12})?)\s*([KMGT]?i?B)")
_OTHERS = (
    (re.compile(r"\d+(\.\d+)?\s*(ms|us|s)\b.*"), "a time"),
    (re.compile(r"\d+(\.\d+)?\s*tok/s.*"), "a throughput"),
    (re.compile(r"kv\s*=.*"), "the bytes of the KV cache"),
    (re.compile(r"\d*\.?\d+\s*%?"), "a ratio, which has an option of its own"),
)


@dataclass(frozen=True)
class ByteBudget:
    """The size limit of the stored weights.

    Attributes:
        limit: bytes of all weights.
        around: bytes of weights outside the blocks.
        value: bytes of an unquantized value.
        levels: the storage formats of blocks; None: not quantized.
    """

    limit: Annotated[int, Field(gt=0)]
    around: Annotated[int, Field(ge=0)]
    value: ValueBytes
    levels: Annotated[tuple[SchemeName | None, ...], Field(min_length=1)] = (None,)

    def resized(self, before: int, after: int) -> "ByteBudget":
        """Return the budget after the number of parameters outside the blocks has changed, in the same precision."""
        return replace(self, around=-(-self.around * after // before))


def parse(text: str) -> int:
    """Return the bytes that a budget like "6GiB" or "1.5 GB" allows.

    Raises:
        InputError: it is not a number of bytes; names what it is instead, if known.
    """
    if found := _BYTES.fullmatch(text.strip()):
        amount = round(Decimal(found[1]) * _UNITS[found[2]])
        if amount > 0:
            return amount
    kind = next((f", which is {what}" for pattern, what in _OTHERS if pattern.fullmatch(text.strip())), "")
    raise InputError(
        f"budget is {text[:80]!r}{kind}; it must be bytes of weights over 0: a number with {', '.join(_UNITS)}"
    )
