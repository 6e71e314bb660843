"""The final step for a sparse layer's experts, after it is decided what to keep."""

from torch import nn

from numprune.blocks import Block
from numprune.experts.inputs import Experts
from numprune.experts.refit import refit_experts
from numprune.inputs import PropagatedInputs
from numprune.slices import Kept
from numprune.surgery import narrowed


def finish_experts(
    layer: nn.Module, block: Block, left: Kept, inputs: PropagatedInputs, damping: float | None
) -> float | None:
    """Refit the down projections of the kept experts, advance the inputs, and return the damping of the fit.

    The removed experts stay in `layer` unchanged, and its router still sends tokens to them.

    Args:
        layer: whose experts were seen by `inputs`; the fitted weights are written into it.
        left: what is kept of `block`.
        damping: the smallest one to try if it is chosen; None: no refit.
    """
    small, rest = narrowed(layer, block, left), block.resized(left.size)
    if damping is not None:
        weights = Experts(small, rest).weights
        fitted = refit_experts(
            weights,
            lambda: inputs.to_fit(small, rest),
            damping,
            choose=inputs.from_pruned_prefix,
            processes=inputs.processes,
        )
        damping = fitted.damping
        Experts(layer, block).put(left, fitted.weights)
        small = narrowed(layer, block, left)
    inputs.pass_experts_on(small, rest)
    return damping
