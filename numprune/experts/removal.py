"""Which experts a layer can do without: what its output loses when one goes and its tokens go to the next best.

Of a token, o_e is what expert e would make of it, w(A) are the routing weights (E,) when only the experts A are there:
a softmax of the router's logits over A, of which the k largest count. The experts in A put out O w(A), so that without
the others the loss is 1/2 E[d^T O^T S O d] nats per token, d = w(all) - w(A), S the sensitivity of the loss to the
output. That is exact to second order in the output, and counts what the router then does; it does not count what the
refit of those that stay makes up for. Greedy: each time the expert goes after which the loss is least.
"""

import torch
from torch import Tensor

from numprune.blocks import Routing


def routing_weights(logits: Tensor, routing: Routing) -> Tensor:
    """Return the weights (T, E), zero but for k, from logits (T, E); an expert that is gone has minus infinity."""
    probabilities = logits.softmax(-1)
    largest, experts = probabilities.topk(routing.top_k, -1)
    if routing.normalized:
        largest = largest / largest.sum(-1, keepdim=True)
    return torch.zeros_like(probabilities).scatter_(-1, experts, largest)


def overlaps(outputs: Tensor, sensitivity: Tensor) -> Tensor:
    """Return O^T S O of each token, (T, E, E), from what the experts make of it, (T, E, H), and S (H, H)."""
    return (outputs @ sensitivity) @ outputs.mT


def greedy_experts(logits: Tensor, overlap: Tensor, routing: Routing, least: int) -> tuple[Tensor, Tensor]:
    """Remove experts, each time the one after which the loss is least, until `least` of them are there.

    Args:
        logits: (T, E), the router's.
        overlap: (T, E, E), of `overlaps`.
        routing: how they become weights.
        least: at least k.

    Returns:
        order: (E - least,) experts, first removed first.
        losses: (E - least,) what is lost once all up to this one are gone.
    """
    count = logits.shape[1]
    full, logits = routing_weights(logits, routing), logits.clone()
    current, there = full, set(range(count))
    error = _loss(full - current, overlap)
    order, losses = [], []
    for _ in range(count - least):
        found = {}
        for expert in sorted(there):
            # Where the weights are normalized, only the tokens that go to it are sent elsewhere.
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
