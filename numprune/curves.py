"""Error curves: the cost of removing a block's units, which the allocation `error` uses to divide the ratio.

A block's curve is greedy OBS priced in the model's own loss. With S = E[g g^T], g the loss's gradient at the block's
output (sensitivity.py), removals that leave an output error dy cost 1/2 tr(S E[dy dy^T]) nats per token: greedy OBS
with S^(1/2) W in place of W, and each cost halved. The least squares of compensation are the same for every S, so S
determines prices but not weights.

S is used in full, not reduced to its trace: on two small models at several ratios, this was up to a tenth better or a
thirtieth worse, with no clear winner at high ratios.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from numprune.blocks import Block
from numprune.criteria.obs import greedy_members, greedy_removal
from numprune.linalg import cholesky
from numprune.slices import Size

Errors = Mapping[str, Tensor]  # by block name, as `error_curve` gives them


def error_at(errors: Errors, block: Block, size: Size) -> float:
    """Return the error of a block at this size."""
    members = block.members - size.members if size.units else 0
    return float(errors[block.name][block.units - size.units, members])


def error_curve(
    weight: Tensor,
    gram: Tensor,
    sensitivity: Tensor,
    size: Size,
    *,
    fewest: int = 0,
    members: bool = False,
    scores: Tensor | None = None,
) -> Tensor:
    """Return the loss in nats per token without the n cheapest units and m members of each remaining unit.

    Args:
        weight: (out, D) float64, the consumer's.
        gram: (D, D) float64, E[x x^T] of its inputs.
        sensitivity: (out, out), S.
        size: of the block.
        fewest: smallest number of remaining units; the cost of fewer is not computed but infinity.
        members: members may be removed, too.
        scores: (members,), the cost of m members of every unit, if members are dimensions of queries and keys: units
            have equal shares of it.

    Returns:
        (units + 1, members), n = 0 … units, m = 0 … members - 1, non-decreasing in both; (units + 1, 1) if members
        are not removed.
    """
    priced = cholesky(sensitivity.to(weight)).T @ weight  # S = L L^T: ||L^T dy||^2 = dy^T S dy
    order, costs = greedy_removal(priced, gram, weight.shape[1] // size.units, stop=size.units - fewest)
    lost = torch.cat([costs.new_zeros(1), costs.cumsum(0) / 2, costs.new_full((fewest,), torch.inf)])[:, None]
    if not members or size.members == 1:
        return lost.cpu()
    curve = lost.repeat(1, size.members)
    every = torch.arange(size.units, device=order.device)
    for gone in range(min(size.units, len(order) + 1)):
        left = every[~torch.isin(every, order[:gone])]
        if scores is not None:
            curve[gone] += scores.to(curve) * len(left) / size.units
            continue
        _, rounds = greedy_members(priced, gram, left, size)
        curve[gone, 1:] += rounds.cumsum(0) / 2
    return curve.cpu()
