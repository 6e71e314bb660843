"""Weight magnitude."""

from torch import Tensor

from numprune.criteria.view import BlockView


def magnitude(view: BlockView) -> Tensor:
    """Return the mean over a unit's channels of ||W[:, j]||_2, (units,)."""
    return view.unit_mean(view.weight.norm(dim=0))
