"""Scores of units or members: the highest are kept. One file per score; each takes a `BlockView`.

Scores are only compared within a block, except by the `global` allocation, which sorts the units of all blocks.
"""

from collections.abc import Callable

from torch import Tensor

from numprune.criteria.dimap import dimap
from numprune.criteria.flap import flap
from numprune.criteria.magnitude import magnitude
from numprune.criteria.numerical import numerical, numerical_newton
from numprune.criteria.obs import obs, obs_members
from numprune.criteria.random import random
from numprune.criteria.taylor import taylor
from numprune.criteria.view import BlockView
from numprune.criteria.wanda import wanda

Criterion = Callable[[BlockView], Tensor]

CRITERIA: dict[str, Criterion] = {
    "random": random,
    "magnitude": magnitude,
    "wanda": wanda,
    "flap": flap,
    "dimap": dimap,
    "taylor": taylor,
    "numerical": numerical,
    "numerical-newton": numerical_newton,
    "obs": obs,
    "frequency": obs,  # ranks experts (experts/choice.py); other blocks use obs
}


def member_scores(criterion: str, view: BlockView, units: Tensor) -> Tensor:
    """Return the score of each member of the kept `units` (K,): (K, members)."""
    if criterion == "obs":
        return obs_members(view, units)
    return CRITERIA[criterion](view.of_members()).view(view.units, view.members)[units]


__all__ = ["CRITERIA", "BlockView", "Criterion", "member_scores"]
