"""LLM-Pruner's first-order score of a group of coupled weights (Ma et al., NeurIPS 2023, arXiv 2305.11627)."""

from torch import Tensor

from numprune.criteria.view import BlockView


def taylor(view: BlockView) -> Tensor:
    """Return the sum over a unit's parameters, in all the matrices that share it, of |w dL/dw|, (units,).

    The paper's element-wise importance (section 3.2, first-order term), summed over the group as in its code; L is the
    mean NLL of the calibration tokens. sensitivity.py computes the gradients in one backward pass.
    """
    if view.taylor is None:
        raise ValueError("the view has no Taylor scores: measure the sensitivity with taylor=True")
    return view.taylor.sum(1)
