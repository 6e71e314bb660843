"""Published methods that are not a criterion, an allocation and a compensation.

The comparison measures each by its authors' definitions. `numprune prune` offers none of them.
"""

from collections.abc import Callable

from torch import Tensor
from transformers import PreTrainedModel

from numprune.blocks import Anatomy
from numprune.errors import InputError
from numprune.flows.studies.rivals.dimap import check_modules, dimap_units, dimap_weights
from numprune.flows.studies.rivals.dimap import check_units as check_dimap_units
from numprune.flows.studies.rivals.result import Result
from numprune.flows.studies.rivals.shortgpt import check_layers, shortgpt
from numprune.flows.studies.rivals.slicegpt import check_blocks, slicegpt
from numprune.flows.studies.rivals.wanda_sp import check_units, wanda_sp

Rival = Callable[[PreTrainedModel, Tensor, float, int], Result]  # model (used up), rows, ratio, batch size

RIVALS: dict[str, Rival] = {
    "dimap-units": dimap_units,
    "dimap-weights": dimap_weights,
    "shortgpt": shortgpt,
    "slicegpt": slicegpt,
    "wanda-sp": wanda_sp,
}
_CHECKS: dict[str, Callable[[Anatomy, float], None]] = {
    "dimap-units": check_dimap_units,
    "dimap-weights": lambda anatomy, _: check_modules("dimap-weights", anatomy),
    "shortgpt": lambda anatomy, _: check_layers(anatomy),
    "slicegpt": lambda anatomy, _: check_blocks(anatomy),
    "wanda-sp": lambda anatomy, _: check_units(anatomy),
}
_OF_IMAGES = ("dimap-units", "dimap-weights")  # the others are for language models only

__all__ = ["RIVALS", "Result", "Rival", "check"]


def check(name: str, anatomy: Anatomy, ratio: float) -> None:
    """Refuse a model or ratio that the rival `name` does not support. Raises InputError."""
    if not 0 <= ratio < 1:
        raise InputError(f"ratio is {ratio}; it must be at least 0 and under 1")
    if anatomy.image is not None and name not in _OF_IMAGES:
        raise InputError(f"{name} is measured on language models only, and {anatomy.family} classifies images")
    _CHECKS[name](anatomy, ratio)
