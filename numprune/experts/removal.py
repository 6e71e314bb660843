"""Greedy removal of experts, priced with the rerouting of their tokens to the next best experts.

For a token, o_e is the output of expert e, and w(A) are the routing weights (E,) if only the experts A exist: a softmax
of the router's logits over A, of which the k largest count. The experts in A output O w(A), so the loss from removing
the others is 1/2 E[d^T O^T S O d] nats per token, with d = w(all) - w(A) and S the sensitivity of the loss to the
output. This is exact to second order in the output and includes the rerouting, but not the later refit of the remaining
experts. Each time, the expert is removed that leaves the smallest loss.
"""

import torch
from torch import Tensor

from numprune.blocks import Routing


def routing_weights(logits: Tensor, routing: Routing) -> Tensor:
    """Return the weights (T, E), k of them nonzero, from logits (T, E); a removed expert has minus infinity."""
    probabilities = logits.softmax(-1)
    largest, experts = probabilities.topk(routing.top_k, -1)
    if routing.normalized:
        largest = largest / largest.sum(-1, keepdim=True)
    return torch.zeros_like(probabilities).scatter_(-1, experts, largest)


def overlaps(outputs: Tensor, sensitivity: Tensor) -> Tensor:
    """Return O^T S O of each token, (T, E, E), from the experts' outputs (T, E, H) and S (H, H)."""
    return (outputs @ sensitivity) @ outputs.mT


def greedy_experts(logits: Tensor, overlap: Tensor, routing: Routing, least: int) -> tuple[Tensor, Tensor]:
    """Remove experts, each time the one that leaves the smallest loss, until `least` remain.

    Args:
        logits: (T, E), the router's.
        overlap: (T, E, E), from `overlaps`.
        routing: how logits become weights.
        least: at least k.

    Returns:
        order: (E - least,) experts, first removed first.
        losses: (E - least,) cumulative loss after each removal.
    """
    count = logits.shape[1]
    full, logits = routing_weights(logits, routing), logits.clone()
    current, there = full, set(range(count))
    error = _loss(full - current, overlap)
    order, losses = [], []
    for _ in range(count - least):
        found = {}
        for expert in sorted(there):
            # If the weights are normalized, only the tokens routed to it change.
            moved = (current[:, expert] > 0).nonzero()[:, 0] if routing.normalized else torch.arange(len(logits))
            without = logits[moved].index_fill(1, torch.tensor([expert], device=logits.device), -torch.inf)
            change = _loss(full[moved] - routing_weights(without, routing), overlap[moved]) - error[moved]
            found[expert] = float(change.sum())
        gone = min(found, key=found.__getitem__)
        there.remove(gone)
        logits[:, gone] = -torch.inf
        current = routing_weights(logits, routing)
        error = _loss(full - current, overlap)
        order.append(gone)
        losses.append(float(error.mean()))
    return torch.tensor(order, dtype=torch.long), torch.tensor(losses, dtype=torch.float64)


def _loss(missing: Tensor, overlap: Tensor) -> Tensor:
    """Return 1/2 d^T O^T S O d of each token, (T,)."""
    return (missing[:, None] @ overlap @ missing[..., None])[:, 0, 0] / 2
