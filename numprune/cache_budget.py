"""A budget of KV cache: the bytes of keys and values of one token, in all layers. No tensor library is needed."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from numprune import byte_budget
from numprune.blocks import Anatomy, Block
from numprune.errors import InputError
from numprune.slices import Size

_START, _END = "kv=", "/token"
RULE = "kv=SIZE/token, like kv=64KiB/token"


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


def is_kv(text: str) -> bool:
    """Return whether a budget is meant as one of KV cache."""
    return text.replace(" ", "").startswith(_START)


def parse_kv(text: str) -> int:
    """Return the bytes per token that a budget like "kv=64KiB/token" allows. Raises InputError."""
    bare = text.replace(" ", "")
    try:
        return byte_budget.parse(bare.removeprefix(_START).removesuffix(_END) if bare.endswith(_END) else "")
    except InputError:
        raise InputError(f"budget is {text[:80]!r}; one of KV cache must be {RULE}") from None
