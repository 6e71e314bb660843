"""FLAP's fluctuation score (An et al., AAAI 2024, arXiv 2312.11983, section 3.2)."""

from torch import Tensor

from numprune.criteria.view import BlockView


def flap(view: BlockView) -> Tensor:
    """Return the mean over a unit's channels of Var(x_j) * ||W[:, j]||_2^2, standardised over the block, (units,).

    Channel scores are standardised before averaging, as in the paper, to make blocks comparable in a global sort.
    """
    variance = (view.gram.diagonal() - view.mean.square()).clamp_min(0)
    scores = variance * view.weight.square().sum(0)
    spread = scores.std()
    standardised = (scores - scores.mean()) / spread if spread > 0 else scores * 0
    return view.unit_mean(standardised)
