"""The options that an artifact may ask of vLLM.

They are in its manifest, and whoever can write an artifact can write that. Among vLLM's options are some that run the
artifact's code or read pickles, so only what our exporter writes is passed on.
"""

import json
from pathlib import Path

from numprune.errors import IntegrityError

_TRANSFORMERS = ("--model-impl", "transformers")
_POOLERS = tuple(
    ("--pooler-config", json.dumps({"pooling_type": pooling, "use_activation": normalized}))
    for pooling in ("MEAN", "CLS", "LAST")
    for normalized in (False, True)
)
_KNOWN: tuple[tuple[str, ...], ...] = ((), _TRANSFORMERS, *_POOLERS)


def checked(needs: object, where: Path | str) -> tuple[str, ...]:
    """The options themselves. Raises IntegrityError for others than our exporter writes."""
    for known in _KNOWN:
        if needs == list(known):
            return known
    raise IntegrityError(f"{where}: asks for options of vLLM that no export of numprune needs: {str(needs)[:200]}")
