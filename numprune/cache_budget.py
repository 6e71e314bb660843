"""Budgets of KV cache: the bytes of keys and values in all layers, of one token, or of one sequence at a context.

No tensor library is needed.
"""

import re
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from numprune import byte_budget
from numprune.blocks import Anatomy, Block
from numprune.budget import kv_bytes
from numprune.errors import InputError
from numprune.slices import Size

_START, _END = "kv=", "/token"
_AT = re.compile(r"(.+)@ctx=([1-9]\d{0,8})")
RULE = "kv=SIZE/token, like kv=64KiB/token, or kv=SIZE@ctx=TOKENS, like kv=8MiB@ctx=4096"


@dataclass(frozen=True)
class KvBudget:
    """The limit of the KV cache.

    Attributes:
        limit: bytes of each token.
        value: bytes of a key's or value's entry, by the data type of the checkpoint; models in memory have another.
    """

    limit: Annotated[int, Field(gt=0)]
    value: Annotated[int, Field(gt=0)]

    def __str__(self) -> str:
        return f"{self.limit:,} bytes of KV cache per token"

    def cost(self, anatomy: Anatomy, block: Block, size: Size) -> int:
        """Return the bytes of a block of this model at this size."""
        return 2 * size.units * anatomy.head_dim * self.value if block.kind == "attention" else 0


@dataclass(frozen=True)
class SequenceBudget:
    """The limit of the KV cache of one sequence, which windows in some layers keep.

    Attributes:
        limit: bytes of keys and values in all layers.
        context: tokens of the sequence.
        value: as in `KvBudget`.
    """

    limit: Annotated[int, Field(gt=0)]
    context: Annotated[int, Field(gt=0)]
    value: Annotated[int, Field(gt=0)]

    def __str__(self) -> str:
        return f"{self.limit:,} bytes of KV cache at {self.context:,} tokens"

    def cost(self, anatomy: Anatomy) -> int:
        """Return the bytes of a sequence in this model."""
        return kv_bytes(anatomy, self.context, self.value)


def is_kv(text: str) -> bool:
    """Return whether a budget is meant as one of KV cache."""
    return text.replace(" ", "").startswith(_START)


def is_of_sequence(text: str) -> bool:
    """Return whether a budget of KV cache is of a sequence, not of a token."""
    return is_kv(text) and "@" in text


def parse_kv(text: str) -> int:
    """Return the bytes per token that a budget like "kv=64KiB/token" allows. Raises InputError."""
    bare = text.replace(" ", "")
    return _bytes(bare.removesuffix(_END) if bare.endswith(_END) else "", text)


def parse_sequence(text: str) -> tuple[int, int]:
    """Return the bytes and the context of a budget like "kv=8MiB@ctx=4096". Raises InputError."""
    found = _AT.fullmatch(text.replace(" ", ""))
    return _bytes(found[1] if found else "", text), int(found[2]) if found else 0


def _bytes(bare: str, text: str) -> int:
    try:
        return byte_budget.parse(bare.removeprefix(_START))
    except InputError:
        raise InputError(f"budget is {text[:80]!r}; one of KV cache must be {RULE}") from None
