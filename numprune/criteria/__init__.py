"""Scores of units: the higher, the sooner kept. One file per score; all see the same `BlockView`.

Scores are only compared inside a block, except by the `global` allocation, which sorts the units of all blocks.
"""

from collections.abc import Callable

from torch import Tensor

from numprune.criteria.flap import flap
from numprune.criteria.magnitude import magnitude
from numprune.criteria.numerical import numerical, numerical_newton
from numprune.criteria.obs import obs
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
    "taylor": taylor,
    "numerical": numerical,
    "numerical-newton": numerical_newton,
    "obs": obs,
}

__all__ = ["CRITERIA", "BlockView", "Criterion"]
