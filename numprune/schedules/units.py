"""The units of a training: which remain, and the masks that remove the others.

A mask multiplies a unit's input to its block's consumer, as in numprune/learning/masks.py: a unit with mask 0 is
removed from the model, but its weights are kept in case it comes back.

Notation: U units of all blocks with masks together.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn

from numprune.blocks import Block
from numprune.calibration import consumer_of
from numprune.errors import InputError
from numprune.learning.masks import fold_block, multiplier


class Units:
    """The masks of some blocks' units.

    Attributes:
        layers: the decoder layers.
        blocks: with masks.
        count: U.

    Args:
        gradients: whether the loss is differentiated with respect to the masks.
    """

    def __init__(self, layers: Sequence[nn.Module], blocks: Sequence[Block], *, gradients: bool) -> None:
        self.layers, self.blocks = layers, tuple(blocks)
        self._counts = [block.units for block in blocks]
        self.count = sum(self._counts)
        self._kept = torch.ones(self.count)  # 1 or 0
        self._values = [
            torch.ones(1, block.units, device=self._device(block), requires_grad=gradients) for block in blocks
        ]
        self._hooks: list[Any] = []

    def _device(self, block: Block) -> torch.device:
        return self.layers[block.layer].get_parameter(block.reader.tensor).device

    def attach(self) -> None:
        """Run the model with the masks."""
        for block, value in zip(self.blocks, self._values, strict=True):
            hook = multiplier(block, value)
            self._hooks.append(consumer_of(self.layers[block.layer], block).register_forward_pre_hook(hook))

    def detach(self) -> None:
        """Run the model without the masks."""
        while self._hooks:
            self._hooks.pop().remove()

    def fold(self) -> None:
        """Multiply the masks into the consumers' weights, so that the model needs none."""
        for block, value in zip(self.blocks, self._values, strict=True):
            fold_block(self.layers[block.layer], block, value.detach()[0])

    @torch.no_grad()
    def multiply(self, factors: Tensor) -> None:
        """Set the masks of the remaining units to `factors` (U,), and those of the others to 0."""
        for value, part in zip(self._values, (factors * self._kept).split(self._counts), strict=True):
            value.copy_(part)

    def gradients(self, step: int) -> Tensor:
        """Return the loss's gradients with respect to the masks since the last call, (U,) float32 on the CPU.

        Those of several processes are averaged. Units that are out have a gradient, too.

        Raises:
            InputError: a gradient is not finite.
        """
        parts = [torch.zeros_like(value) if value.grad is None else value.grad for value in self._values]
        found = torch.cat([part[0].cpu() for part in parts])
        for value in self._values:
            value.grad = None
        if distributed.is_available() and distributed.is_initialized():
            found = _mean_over_processes(found, self._values[0].device)
        require_finite(found, step)
        return found

    def by_block(self, values: Tensor) -> dict[str, Tensor]:
        """Return values (U,) by block name, (units,) each."""
        return {block.name: part for block, part in zip(self.blocks, values.split(self._counts), strict=True)}

    def keep(self, kept: Mapping[str, Tensor]) -> None:
        """Keep the units of each block with these indices, and remove the others, from the next `multiply` on."""
        self._kept.zero_()
        for name, part in self.by_block(self._kept).items():
            part[kept[name]] = 1

    def kept(self) -> dict[str, Tensor]:
        """Return the indices of the remaining units of each block, ascending."""
        return {name: part.nonzero()[:, 0] for name, part in self.by_block(self._kept).items()}

    def state(self) -> dict[str, Tensor]:
        """Return what `restore` needs."""
        return {"kept": self._kept}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Resume from what `state` returned."""
        self._kept.copy_(state["kept"])


def require_finite(scores: Tensor, step: int) -> None:
    """Raise InputError if a score after this step is not finite."""
    if not scores.isfinite().all():
        raise InputError(f"training diverged by step {step}: scores of units are not finite; lower the learning rate")


def _mean_over_processes(values: Tensor, device: torch.device) -> Tensor:
    shared = values.to(device)  # where the back-end takes tensors
    distributed.all_reduce(shared)
    return shared.cpu() / distributed.get_world_size()
