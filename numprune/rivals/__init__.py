"""Published methods that are no criterion, allocation and compensation: what the comparison has beside those.

Each is measured by its authors' definitions; none of them is offered by `numprune prune`.
"""

from collections.abc import Callable

from torch import Tensor
from transformers import PreTrainedModel

from numprune.rivals.result import Result
from numprune.rivals.shortgpt import shortgpt
from numprune.rivals.slicegpt import slicegpt

Rival = Callable[[PreTrainedModel, Tensor, float, int], Result]  # model (used up), rows, ratio, batch size

RIVALS: dict[str, Rival] = {"shortgpt": shortgpt, "slicegpt": slicegpt}

__all__ = ["RIVALS", "Result", "Rival"]
