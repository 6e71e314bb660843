"""The multiple-choice knapsack under several limits: enough must be saved of each of several quantities.

Notation: K limits, I items, O options of the item that has most.

The problem is that of Puzzle (arXiv 2411.19146, appendix B), solved by Lagrangian relaxation (Geoffrion 1974): one
limit stays in the dynamic programme of `knapsack`, and the costs of the others are added to the prices with
multipliers. These are the optimal ones of the linear relaxation times a factor, which is swept until the others are
met. Choices that miss a limit are repaired by exchanging single options.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from numprune.knapsack import improved, knapsack, lower_bound, padded

Savings = Sequence[Sequence[int]]  # of every option of every item
Prices = Sequence[Sequence[float]]

_DOUBLINGS, _HALVINGS = 12, 8  # of the factor
_LEAST_SHARE = 1e-3  # smallest multiplier, as a share of all prices for what is wanted
_ROUNDING = 1e-12  # of shares of what is wanted


class Solution(NamedTuple):
    """A choice, and what no choice can fall below.

    Attributes:
        chosen: one option of each item.
        bound: a price that no choice falls below, the optimum of the linear relaxation.
    """

    chosen: list[int]
    bound: float


def multi_knapsack(savings: Sequence[Savings], prices: Prices, wanted: Sequence[int]) -> Solution | None:
    """Return one option of each item, such that at least `wanted` is saved of each quantity, at a low price.

    The choice is as good as that of `knapsack` if one limit decides: the choice for it alone then meets the others.
    Otherwise it exceeds the lowest possible price by at most its distance from the bound.

    Args:
        savings: of every option of every item, for each of K quantities.
        prices: of every option, finite and at least 0; they add up.
        wanted: of each quantity.

    Returns:
        None if no choice was found that saves enough of everything.
    """
    units = [max(math.gcd(*(one for item in table for one in item)), 1) for table in savings]
    savings = [[[one // unit for one in item] for item in table] for table, unit in zip(savings, units, strict=True)]
    wanted = [max(-(-amount // unit), 0) for amount, unit in zip(wanted, units, strict=True)]
    problem = _Problem(savings, prices, wanted)
    for table, least in zip(savings, wanted, strict=True):
        chosen = knapsack(table, prices, least)
        if problem.is_met(chosen):
            return Solution(chosen, problem.bound())
    multipliers = problem.multipliers() if len(wanted) > 1 else None
    if multipliers is None:
        return None
    found = problem.swept(multipliers) or problem.saving_most()
    return Solution(min(found, key=problem.price), problem.bound(multipliers)) if found else None


def saving_most(savings: Sequence[Savings], wanted: Sequence[int], own: int) -> list[int] | None:
    """Return the choice that saves the most of quantity `own` among those that save enough of the others.

    None: no choice was found that saves enough of the others.
    """
    costs = [[float(max(item) - one) for one in item] for item in savings[own]]
    others = [number for number in range(len(wanted)) if number != own]
    found = multi_knapsack([savings[other] for other in others], costs, [wanted[other] for other in others])
    return found.chosen if found else None


def is_possible(savings: Sequence[Savings], wanted: Sequence[int]) -> bool:
    """Return whether a choice was found that saves enough of every quantity; exact, up to rounding, for two."""
    found = (saving_most(savings, wanted, own) for own in range(len(wanted)))
    return any(
        chosen is not None and all(total(table, chosen) >= least for table, least in zip(savings, wanted, strict=True))
        for chosen in found
    )


def total(table: Prices, chosen: Sequence[int]) -> float:
    """Return the sum over the chosen options; exact for integers below 2^53."""
    return math.fsum(row[option] for row, option in zip(table, chosen, strict=True))


class _Problem:
    """Savings and prices, also as tensors."""

    def __init__(self, savings: Sequence[Savings], prices: Prices, wanted: Sequence[int]) -> None:
        self._savings, self._prices, self._wanted = savings, prices, wanted
        self._saved = torch.stack([padded(table, 0.0) for table in savings])  # (K, I, O)
        self._priced = padded(prices, math.inf)  # (I, O)
        self._least = torch.tensor(wanted, dtype=torch.float64)  # (K,)
        self._scale = self._least.clamp_min(1)

    def price(self, chosen: Sequence[int]) -> float:
        return total(self._prices, chosen)

    def is_met(self, chosen: Sequence[int]) -> bool:
        return all(total(table, chosen) >= least for table, least in zip(self._savings, self._wanted, strict=True))

    def multipliers(self) -> Tensor | None:
        """Return the optimal multipliers (K,) of the linear relaxation; None if it has no solution."""
        from scipy import optimize, sparse  # here: the import takes half a second

        finite = self._priced.isfinite()
        items = finite.nonzero()[:, 0].numpy()
        choices = sparse.csr_array((np.ones(len(items)), (items, np.arange(len(items)))))
        found = optimize.linprog(
            self._priced[finite].numpy(),
            A_ub=-(self._saved / self._scale[:, None, None])[:, finite].numpy(),
            b_ub=-(self._least / self._scale).numpy(),
            A_eq=choices,
            b_eq=np.ones(choices.shape[0]),
            method="highs",
        )
        if found.x is None:
            return None
        return torch.from_numpy(-found.ineqlin.marginals).clamp_min(0) / self._scale

    def bound(self, multipliers: Tensor | None = None) -> float:
        """Return a price that no choice falls below: by each limit alone and, with multipliers, by all together."""
        each = zip(self._saved, self._least.tolist(), strict=True)
        bounds = [lower_bound(saved, self._priced, least) for saved, least in each]
        if multipliers is not None:
            bounds.append(float(self._reduced(multipliers).amin(1).sum() + multipliers @ self._least))
        return max(0.0, *bounds)  # prices are at least 0, which rounding can miss

    def _reduced(self, multipliers: Tensor) -> Tensor:
        return self._priced - (multipliers[:, None, None] * self._saved).sum(0)

    def swept(self, multipliers: Tensor) -> list[list[int]]:
        """Return choices that meet all limits, by these multipliers and by multiples of them."""
        found: list[list[int]] = []
        costs = self._saved.amax(2, keepdim=True) - self._saved  # at least 0, unlike savings

        def is_met(inside: int, multipliers: Tensor) -> bool:
            priced = self._priced + (multipliers[:, None, None] * costs).sum(0)
            prices = [row[: len(own)].tolist() for row, own in zip(priced, self._prices, strict=True)]
            chosen = knapsack(self._savings[inside], prices, self._wanted[inside])
            found.extend(self._repaired(torch.tensor(chosen)))
            return self.is_met(chosen)

        found.extend(self._repaired(self._reduced(multipliers).min(1).indices))
        least = _LEAST_SHARE * sum(map(max, self._prices)) / self._scale
        for inside in range(len(self._wanted)):
            others = torch.maximum(multipliers, least)
            others[inside] = 0.0
            low, high = 0.0, 1.0
            for _ in range(_DOUBLINGS):
                if is_met(inside, high * others):
                    break
                low, high = high, 2 * high
            for _ in range(_HALVINGS):
                between = (low + high) / 2
                low, high = (low, between) if is_met(inside, between * others) else (between, high)
        return found

    def saving_most(self) -> list[list[int]]:
        """Return choices that meet all limits, whatever their prices."""
        found = [saving_most(self._savings, self._wanted, own) for own in range(len(self._wanted))]
        return [choice for chosen in found if chosen for choice in self._repaired(torch.tensor(chosen))]

    def _repaired(self, chosen: Tensor) -> list[list[int]]:
        """Return the choice (I,) with options exchanged until it meets all limits; empty if that fails.

        Each time, the exchange is made whose price is lowest relative to what is then missing less. At the end, options
        are exchanged for cheaper ones.
        """
        chosen, scale = chosen.clone(), self._scale[:, None, None]
        while True:
            own = self._saved.gather(2, chosen.expand(len(self._saved), -1)[..., None])  # (K, I, 1)
            missing = self._least[:, None, None] - own.sum(1, keepdim=True)  # (K, 1, 1)
            if not (missing > 0).any():
                return [improved(self._saved, self._priced, chosen, self._least).tolist()]
            left = (missing + own - self._saved).clamp_min(0) / scale  # after each exchange
            gains = (missing.clamp_min(0) / scale).sum(0) - left.sum(0)  # (I, O)
            paid = self._priced - self._priced.gather(1, chosen[:, None])
            rates = (paid / gains).where((gains > _ROUNDING) & paid.isfinite(), torch.inf)
            item, option = divmod(int(rates.argmin()), rates.shape[1])
            if rates[item, option].isinf():
                return []
            chosen[item] = option
