"""Greedy optimal brain surgeon on whole units: the strongest simple rival."""

import torch
from torch import Tensor

from numprune.criteria.view import BlockView
from numprune.linalg import damped, spd_inverse


def obs(view: BlockView) -> Tensor:
    """Return, for each unit, the share of the block's output energy lost once it is removed in greedy order, (units,).

    Removing units in ascending order of this score is removing them in greedy order, each time the one whose removal
    costs least after the other weights were refitted; the score at the n-th is the block's error curve at n.
    """
    order, costs = greedy_removal(view.weight, view.gram, view.channels_per_unit)
    energy = torch.einsum("od,de,oe->", view.weight, view.gram, view.weight)
    scores = torch.empty(view.units, dtype=view.weight.dtype, device=view.weight.device)
    scores[order] = costs.cumsum(0) / energy.clamp_min(torch.finfo(energy.dtype).tiny)
    return scores


def greedy_removal(
    weight: Tensor, gram: Tensor, channels_per_unit: int, damping: float = 1e-4
) -> tuple[Tensor, Tensor]:
    """Remove every unit, cheapest first, refitting what is left after each removal.

    With Q = (G + gamma I)^-1, removing unit u with channels g costs s_u = tr(W_g (Q_gg)^-1 W_g^T), after which
    W <- W - W_g Q_gg^-1 Q_g: and Q <- Q - Q_:g Q_gg^-1 Q_g: (Hassibi & Stork 1993 for one channel; Kurtic et al. 2023,
    ZipLM, arXiv 2302.04089, eq. 2-4, for groups).

    Args:
        weight: (out, D) float64.
        gram: (D, D) float64.
        channels_per_unit: c; D is a multiple.
        damping: gamma relative to the mean of diag(G).

    Returns:
        order: (units,) unit indices, first removed first.
        costs: (units,) the squared output error E||dy||^2 that each removal adds, in that order.
    """
    c = channels_per_unit
    units = weight.shape[1] // c
    weight = weight.clone()
    inverse = spd_inverse(damped(gram, damping)).contiguous()
    alive = torch.ones(units, dtype=torch.bool, device=weight.device)
    order = torch.empty(units, dtype=torch.long, device=weight.device)
    costs = torch.empty(units, dtype=weight.dtype, device=weight.device)
    blocks = torch.arange(units, device=weight.device)
    for step in range(units):
        if c == 1:
            cost = weight.square().sum(0) / inverse.diagonal()
        else:
            diagonal = inverse.view(units, c, units, c)[blocks, :, blocks, :]  # (units, c, c)
            grouped = weight.view(-1, units, c).permute(1, 2, 0)  # (units, c, out)
            cost = _grouped_cost(diagonal, grouped, alive)
        cost[~alive] = torch.inf
        unit = int(cost.argmin())
        channels = slice(unit * c, (unit + 1) * c)
        order[step], costs[step] = unit, cost[unit]
        alive[unit] = False
        rows = torch.linalg.solve(inverse[channels, channels], inverse[channels])  # Q_gg^-1 Q_g:
        columns = inverse[:, channels].clone()
        weight.addmm_(weight[:, channels].clone(), rows, alpha=-1)
        inverse.addmm_(columns, rows, alpha=-1)
        # Exact arithmetic leaves zeros here; rounding does not, and a removed channel must not come back.
        weight[:, channels] = 0
        inverse[channels, :] = 0
        inverse[:, channels] = 0
        inverse.diagonal()[channels] = 1
    return order, costs


def _grouped_cost(diagonal: Tensor, grouped: Tensor, alive: Tensor) -> Tensor:
    cost = torch.zeros(len(diagonal), dtype=diagonal.dtype, device=diagonal.device)
    solved = torch.linalg.solve(diagonal[alive], grouped[alive])
    cost[alive] = (grouped[alive] * solved).sum((1, 2))
    return cost
