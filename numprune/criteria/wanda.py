"""Wanda's score (Sun et al. 2023, arXiv 2306.11695), taken over a structure's weights in the L2 norm.

The authors of FLAP take the L1 mean over rows instead: see `wanda-sp` in flows/studies/rivals.
"""

from torch import Tensor

from numprune.criteria.view import BlockView


def wanda(view: BlockView) -> Tensor:
    """Return the mean over a unit's channels of ||W[:, j]||_2 * sqrt(E[x_j^2]), (units,)."""
    return view.unit_mean(view.weight.norm(dim=0) * view.gram.diagonal().sqrt())
