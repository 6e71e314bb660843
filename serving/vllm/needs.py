"""vLLM options that an artifact may request.

They are in its manifest, which anyone who can write an artifact can write. Some vLLM options run the artifact's code or
read pickles, so only those that our exporter writes are passed on.
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
    """Return the options. Raises IntegrityError for options that our exporter does not write."""
    for known in _KNOWN:
        if needs == list(known):
            return known
    raise IntegrityError(f"{where}: requests vLLM options that no numprune export needs: {str(needs)[:200]}")
