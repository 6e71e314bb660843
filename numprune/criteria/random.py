"""Random scores, the baseline that every other criterion must beat."""

import torch
from torch import Tensor

from numprune.criteria.view import BlockView


def random(view: BlockView) -> Tensor:
    """Return seeded uniform noise, (units,)."""
    generator = torch.Generator().manual_seed(view.seed)
    return torch.rand(view.units, generator=generator, dtype=torch.float64).to(view.weight.device)
