"""What the masks may keep: a share of a cost, held by an augmented Lagrangian whose target falls to it step by step."""

from dataclasses import dataclass

import torch
from torch import Tensor

from numprune.blocks import Anatomy
from numprune.budget import budget_of
from numprune.learning.masks import Masks


@dataclass(frozen=True)
class Cost:
    """The prunable parameters as the masks see them.

    Attributes:
        of_unit: (U,), the share of all that goes with each masked unit.
        fixed: the share of the blocks that are not masked.
    """

    of_unit: Tensor
    fixed: float

    def kept(self, masks: Masks) -> Tensor:
        """Return the share that is kept, a unit counted as sigmoid(-log alpha) of itself."""
        return self.fixed + self.of_unit @ torch.sigmoid(-masks.log_alpha)


def cost_of(anatomy: Anatomy, masks: Masks) -> Cost:
    """Return the cost of a model's units in parameters."""
    whole = budget_of(anatomy).prunable_parameters
    of_unit = torch.cat([torch.full((block.units,), block.parameters_per_unit / whole) for block in masks.blocks])
    masked = sum(block.parameters(block.size) for block in masks.blocks)
    return Cost(of_unit.to(masks.mean.device), 1 - masked / whole)


class Lagrangian:
    """l1 * (s - t) + l2 * (s - t)^2, both multipliers found by gradient ascent.

    Args:
        rate: of the ascent.
        quadratic: l2 at first. It damps the swing of s around t, which l1 alone would overshoot in a short training.
    """

    def __init__(self, rate: float, quadratic: float) -> None:
        self._rate = rate
        self._linear, self._quadratic = 0.0, quadratic

    def penalty(self, excess: Tensor) -> Tensor:
        """Return what is added to the loss where `excess` = s - t."""
        return self._linear * excess + self._quadratic * excess.square()

    def ascend(self, excess: float) -> None:
        """Move the multipliers up the gradient of the penalty."""
        self._linear += self._rate * excess
        self._quadratic += self._rate * excess**2
