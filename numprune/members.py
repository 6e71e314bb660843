"""Sums over the parameters of each unit and its members."""

from collections.abc import Callable

import torch
from torch import Tensor

from numprune.blocks import Block
from numprune.slices import Kept


def by_member(block: Block, values: Callable[[str], Tensor], device: torch.device) -> Tensor:
    """Return the sum of `values` over the parameters of each unit's members, (units, members) float64.

    Parameters shared by members are divided equally among them.

    Args:
        block: with units.
        values: returns a value of each parameter, float64, of the tensor with a name in the layer; one tensor at a time
            is in memory.
        device: of the values.
    """
    every = Kept.whole(torch.arange(block.units), block.members).to(device)
    total = torch.zeros(block.size, dtype=torch.float64, device=device)
    for part in block.slices:
        by_entry = part.by_entry(values(part.tensor))
        entries = by_entry.reshape(len(by_entry), -1).sum(1)
        for index, extent in enumerate(part.parts):
            own = entries[part.entries(every, block.size, index)].view(block.units, -1)
            if extent.divided:
                total += own.view(block.units, block.members, -1).sum(2)
            else:
                total += own.sum(1, keepdim=True) / block.members
    return total
