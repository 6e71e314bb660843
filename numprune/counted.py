"""Numbers with their noun."""

import re
from collections.abc import Collection

_OF = re.compile(r" (?:of|per) ")


def counted(amount: int, what: str) -> str:
    """`1 window of 512 tokens`, `4 KV groups per layer`: plural unless there is exactly one.

    Args:
        amount: how many.
        what: a noun whose plural ends in -s, perhaps followed by "of" or "per" and more words.
    """
    end = match.start() if (match := _OF.search(what)) else len(what)
    return f"{amount:,} {what[:end]}{'' if amount == 1 else 's'}{what[end:]}"


def numbered_layers(layers: Collection[int]) -> str:
    """`layer 3`, `layers 3, 5`: in ascending order."""
    return f"layer{'' if len(layers) == 1 else 's'} {', '.join(map(str, sorted(layers)))}"
