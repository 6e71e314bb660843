"""The remaining units of a training, and their scores.

A mask of 0 or 1 multiplies a unit's input to its block's consumer, as in numprune/learning/masks.py: a unit with mask 0
is removed from the model, but its weights are kept in case it comes back.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn

from numprune.blocks import Block
from numprune.calibration import consumer_of
from numprune.errors import InputError
from numprune.learning.masks import fold_block, multiplier


def magnitude(layer: nn.Module, block: Block) -> Tensor:
    """Return the mean over a unit's channels of ||W[:, j]||_2, W the consumer's weight: (units,) float32.

    This is the criterion `magnitude`, also for experts.
    """
    weight = layer.get_parameter(block.reader.tensor).detach().float()
    norms = block.reader.by_entry(weight).flatten(1).norm(dim=1)
    return norms.view(block.units, -1).mean(1)


class Units:
    """The masks of some blocks, and the movement of their units.

    The movement of a unit is the sum of -dL/dz over the steps, z its mask. As z multiplies what the consumer's weights
    w of the unit read, that is the sum of -w dL/dw over them: movement pruning (Sanh et al., NeurIPS 2020, section 4)
    with one score for a group of weights (Lagunas et al., EMNLP 2021). Units that are out have a gradient too, and can
    come back.

    Args:
        layers: the decoder layers.
        blocks: with masks.
        movement: whether to sum it up.
    """

    def __init__(self, layers: Sequence[nn.Module], blocks: Sequence[Block], *, movement: bool) -> None:
        self._layers, self._blocks = layers, tuple(blocks)
        self._values = {}  # block name -> (1, units), the masks
        for block in blocks:
            device = layers[block.layer].get_parameter(block.reader.tensor).device
            self._values[block.name] = torch.ones(1, block.units, device=device, requires_grad=movement)
        self._movement = {block.name: torch.zeros(block.units) for block in blocks} if movement else None
        self._hooks: list[Any] = []

    def attach(self) -> None:
        """Run the model with the masks."""
        for block in self._blocks:
            hook = multiplier(block, self._values[block.name])
            self._hooks.append(consumer_of(self._layers[block.layer], block).register_forward_pre_hook(hook))

    def detach(self) -> None:
        """Run the model without the masks."""
        while self._hooks:
            self._hooks.pop().remove()

    def fold(self) -> None:
        """Set the consumers' weights of removed units to zero, so that the model needs no masks."""
        for block in self._blocks:
            fold_block(self._layers[block.layer], block, self._values[block.name].detach()[0])

    def collect(self, step: int) -> None:
        """Add this step's gradients of the masks to the movement, the mean over all processes.

        Raises:
            InputError: a gradient is not finite.
        """
        if self._movement is None:
            return
        names = [name for name, value in self._values.items() if value.grad is not None]
        found = [self._values[name].grad for name in names]
        gradients = torch.cat([gradient[0].cpu() for gradient in found if gradient is not None] or [torch.zeros(0)])
        if distributed.is_available() and distributed.is_initialized():
            gradients = _mean_over_processes(gradients, next(iter(self._values.values())).device)
        _require_finite(gradients, step)
        for name, gradient in zip(names, gradients.split([self._values[name].numel() for name in names]), strict=True):
            self._movement[name] -= gradient
            self._values[name].grad = None

    def scores(self, step: int) -> dict[str, Tensor]:
        """Return the score of each unit by block, (units,) float32 on the CPU; the highest are kept.

        Raises:
            InputError: a score is not finite.
        """
        if self._movement is not None:
            return self._movement
        found = {block.name: magnitude(self._layers[block.layer], block).cpu() for block in self._blocks}
        _require_finite(torch.cat([*found.values()]), step)
        return found

    @torch.no_grad()
    def keep(self, kept: Mapping[str, Tensor]) -> None:
        """Set the masks of the `kept` indices of each block to 1, and the others to 0."""
        for name, value in self._values.items():
            value.zero_()[0, kept[name].to(value.device)] = 1

    def kept(self) -> dict[str, Tensor]:
        """Return the indices of the units of each block whose mask is 1, ascending."""
        return {name: value.detach()[0].nonzero()[:, 0].cpu() for name, value in self._values.items()}

    def state(self) -> Tensor:
        """Return everything that the next step depends on, (2, U) float32: masks and movement."""
        masks = torch.cat([value.detach()[0].cpu() for value in self._values.values()])
        movement = torch.cat([*self._movement.values()]) if self._movement else torch.zeros_like(masks)
        return torch.stack([masks, movement])

    @torch.no_grad()
    def restore(self, state: Tensor) -> None:
        """Resume from what `state` returned."""
        parts = state.split([block.units for block in self._blocks], 1)
        for block, (mask, movement) in zip(self._blocks, parts, strict=True):
            self._values[block.name][0] = mask.to(self._values[block.name].device)
            if self._movement is not None:
                self._movement[block.name] = movement.clone()


def _mean_over_processes(values: Tensor, device: torch.device) -> Tensor:
    shared = values.to(device)  # where the back-end takes tensors
    distributed.all_reduce(shared)
    return shared.cpu() / distributed.get_world_size()


def _require_finite(values: Tensor, step: int) -> None:
    if not values.isfinite().all():
        raise InputError(f"training diverged by step {step}: scores of units are not finite; lower the learning rate")
