"""What ranks the units of a training: magnitude, movement, or trained masks (bottleneck.py)."""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from numprune.blocks import Block
from numprune.schedules.units import Units, require_finite


class Scores(Protocol):
    """The scores of `Units`, and the factors that multiply the remaining ones."""

    def factors(self, step: int | None) -> Tensor:
        """Return the factors (U,) for training step `step`; None: for evaluation, and at the end."""
        ...

    def collect(self, step: int, target: float) -> None:
        """Take in the gradients of a step; `target`: the share of the prunable parameters to keep next."""
        ...

    def scores(self, step: int) -> Tensor:
        """Return the scores (U,) after a step, on the CPU; the highest are kept. Raises InputError if not finite."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Return what `restore` needs."""
        ...

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Resume from what `state` returned."""
        ...


def magnitude(layer: nn.Module, block: Block) -> Tensor:
    """Return the mean over a unit's channels of ||W[:, j]||_2, W the consumer's weight: (units,) float32.

    This is the criterion `magnitude`, also for experts.
    """
    weight = layer.get_parameter(block.reader.tensor).detach().float()
    norms = block.reader.by_entry(weight).flatten(1).norm(dim=1)
    return norms.view(block.units, -1).mean(1)


class Magnitude:
    """Scores by the weights as they are."""

    def __init__(self, units: Units) -> None:
        self._units = units

    def factors(self, step: int | None) -> Tensor:
        return torch.ones(self._units.count)

    def collect(self, step: int, target: float) -> None:
        pass

    def scores(self, step: int) -> Tensor:
        found = [magnitude(self._units.layers[block.layer], block).cpu() for block in self._units.blocks]
        scores = torch.cat(found)
        require_finite(scores, step)
        return scores

    def state(self) -> dict[str, Tensor]:
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        pass


class Movement:
    """The sum of -dL/dz over the steps, z a unit's mask.

    As z multiplies what the consumer's weights w of the unit read, that is the sum of -w dL/dw over them: movement
    pruning (Sanh et al., NeurIPS 2020, section 4) with one score for a group of weights (Lagunas et al., EMNLP 2021).
    """

    def __init__(self, units: Units) -> None:
        self._units = units
        self._total = torch.zeros(units.count)

    def factors(self, step: int | None) -> Tensor:
        return torch.ones(self._units.count)

    def collect(self, step: int, target: float) -> None:
        self._total -= self._units.gradients(step)

    def scores(self, step: int) -> Tensor:
        return self._total

    def state(self) -> dict[str, Tensor]:
        return {"movement": self._total}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self._total.copy_(state["movement"])
