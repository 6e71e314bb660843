"""numprune's linear algebra implemented as published, for comparison.

These are generators that yield after each of their equal steps, so that a long one can be timed without finishing it,
and return the result.
"""

from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from numprune.linalg import damped


def newton(A: Tensor, ratio: float, penalty: float = 10.0, iterations: int = 50) -> Generator[None, None, Tensor]:
    """Algorithm 1 of Shen et al. (AAAI 2025, arXiv 2412.12441): Newton's iteration on L from z = 1; returns z (D,).

    Args:
        A: (D, D) float64.
        ratio: rho, the share of the channels to remove.
        penalty: lambda.
        iterations: about 50 in the paper.
    """
    D = len(A)
    ones = torch.ones(D, dtype=A.dtype, device=A.device)
    z = ones.clone()
    for _ in range(iterations):
        gradient = A @ (z - 1) + penalty * (z.sum() - (1 - ratio) * D) * ones
        hessian = A + penalty * torch.outer(ones, ones)
        z = z - torch.linalg.solve(hessian, gradient)
        yield
    return z


def removal(weight: Tensor, gram: Tensor, damping: float = 1e-4) -> Generator[None, None, tuple[Tensor, Tensor]]:
    """Greedy OBS on channels, updating the whole inverse (D, D) and weight (out, D) after each removal.

    Returns order and costs like `numprune.criteria.obs.greedy_removal`.
    """
    weight = weight.clone()
    inverse = torch.linalg.inv(damped(gram, damping))
    removed = torch.zeros(len(gram), dtype=torch.bool, device=gram.device)
    order, costs = [], []
    for _ in range(len(gram)):
        cost = (weight.square().sum(0) / inverse.diagonal()).masked_fill(removed, torch.inf)
        p = int(cost.argmin())
        order.append(p)
        costs.append(cost[p])
        removed[p] = True
        row = inverse[p] / inverse[p, p]
        weight -= torch.outer(weight[:, p], row)
        inverse -= torch.outer(inverse[:, p], row)
        yield
    return torch.tensor(order), torch.stack(costs)


def gram(batches: Sequence[Tensor]) -> Generator[None, None, Tensor]:
    """E[x x^T], (D, D) float64, as a sum of whole products in float64."""
    D = batches[0].shape[1]
    total = torch.zeros(D, D, dtype=torch.float64, device=batches[0].device)
    for batch in batches:
        x = batch.double()
        total += x.T @ x
        yield
    return total / sum(map(len, batches))
