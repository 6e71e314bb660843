"""Published methods that are no criterion, allocation and compensation: what the comparison has beside those.

Each is measured by its authors' definitions; none of them is offered by `numprune prune`.
"""

from collections.abc import Callable

from torch import Tensor
from transformers import PreTrainedModel

from numprune.blocks import Anatomy
from numprune.errors import InputError
from numprune.flows.studies.rivals.result import Result
from numprune.flows.studies.rivals.shortgpt import check_layers, shortgpt
from numprune.flows.studies.rivals.slicegpt import check_blocks, slicegpt

Rival = Callable[[PreTrainedModel, Tensor, float, int], Result]  # model (used up), rows, ratio, batch size

RIVALS: dict[str, Rival] = {"shortgpt": shortgpt, "slicegpt": slicegpt}
_CHECKS: dict[str, Callable[[Anatomy], None]] = {"shortgpt": check_layers, "slicegpt": check_blocks}

__all__ = ["RIVALS", "Result", "Rival", "check"]


def check(name: str, anatomy: Anatomy, ratio: float) -> None:
    """Refuse what the rival `name` cannot do before anything is run. Raises InputError."""
    if not 0 <= ratio < 1:
        raise InputError(f"ratio is {ratio}; it must be at least 0 and under 1")
    _CHECKS[name](anatomy)
