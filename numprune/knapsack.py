"""The multiple-choice knapsack: one option of each item, so that enough is saved at the lowest price.

Notation: I items, O options of the item that has most.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

_SHARES = 20_000
_HALVINGS = 60  # of the interval around the multiplier
_ROUNDING = 1e-12  # of sums of prices


def knapsack(savings: Sequence[Sequence[int]], prices: Sequence[Sequence[float]], wanted: int) -> list[int]:
    """Return one option of each item, such that at least `wanted` is saved at the lowest price.

    Options that no cheapest choice can have are left out first, see `_relaxed`: of a thousand sizes of a block, few
    remain. The others are tried by dynamic programming over the saving that is still missing, in units of the savings'
    greatest common divisor or, if that is below a 20,000th of `wanted`, in units of that size, rounded up. Of the
    choices with the same number of missing units, only the cheapest is followed, with its exact saving.

    If no choice saves enough, every item saves as much as it can.

    Args:
        savings: of every option of every item.
        prices: of the same, finite; they add up.
    """
    most = [
        max(range(len(saved)), key=lambda option: (saved[option], -priced[option]))
        for saved, priced in zip(savings, prices, strict=True)
    ]
    if _sum(savings, most) < wanted:
        return most
    known, candidates = _relaxed(savings, prices, wanted)
    found = _by_shares(
        [[saved[option] for option in left] for saved, left in zip(savings, candidates, strict=True)],
        [[priced[option] for option in left] for priced, left in zip(prices, candidates, strict=True)],
        wanted,
        max(math.gcd(*(saving for item in savings for saving in item)), -(-wanted // _SHARES), 1),
    )
    if found is None:
        return known
    chosen = [left[option] for left, option in zip(candidates, found, strict=True)]
    return known if _sum(prices, known) < _sum(prices, chosen) else chosen


def _sum(table: Sequence[Sequence[float]], chosen: Sequence[int]) -> float:
    return math.fsum(row[option] for row, option in zip(table, chosen, strict=True))


def _relaxed(
    savings: Sequence[Sequence[int]], prices: Sequence[Sequence[float]], wanted: int
) -> tuple[list[int], list[list[int]]]:
    """Return a good choice that saves enough, and the options of each item that a cheapest choice can have.

    By Lagrangian relaxation (Geoffrion 1974): with a multiplier m >= 0, no choice that saves enough costs less than the
    sum of min(price - m * saving) over the items, plus m * wanted; nor one with a certain option less than that plus
    the distance of this option from its item's minimum. What costs more than the known choice is left out.
    """
    saved, priced = padded(savings, 0.0), padded(prices, math.inf)
    multiplier = _multiplier(saved, priced, wanted)
    reduced = priced - multiplier * saved  # (I, O)
    least = reduced.min(1)
    known = improved(saved[None], priced, least.indices, torch.tensor([wanted], dtype=torch.float64)).tolist()
    scale = sum(map(max, prices)) + multiplier * sum(map(max, savings))
    slack = _sum(prices, known) - float(least.values.sum()) - multiplier * wanted + _ROUNDING * scale
    left = reduced - least.values[:, None] <= slack
    return known, [
        options[: len(item)].nonzero().flatten().tolist() for options, item in zip(left, savings, strict=True)
    ]


def padded(table: Sequence[Sequence[float]], filler: float) -> Tensor:
    """Return (I, O) float64 values of every option of every item, `filler` where an item has no more options."""
    items = [torch.tensor(item, dtype=torch.float64) for item in table]
    return pad_sequence(items, batch_first=True, padding_value=filler)


def lower_bound(saved: Tensor, priced: Tensor, wanted: float) -> float:
    """Return the lowest price of saving `wanted` if fractions of options could be chosen, or a little less.

    It is the optimum of the linear relaxation, and thus a lower bound for `knapsack`; infinite if not enough can be
    saved.

    Args:
        saved, priced: (I, O), from `padded` with 0 and infinity.
    """
    if float(saved.amax(1).sum()) < wanted:
        return math.inf
    multiplier = _multiplier(saved, priced, wanted)
    return float((priced - multiplier * saved).amin(1).sum()) + multiplier * wanted


def _multiplier(saved: Tensor, priced: Tensor, wanted: float) -> float:
    """Return a multiplier whose cheapest options save `wanted`, and little more; the tables as for `lower_bound`."""

    def enough(multiplier: float) -> bool:
        cheapest = (priced - multiplier * saved).min(1).indices
        return bool(saved.gather(1, cheapest[:, None]).sum() >= wanted)

    if enough(0.0):
        return 0.0
    low, high = 0.0, float(priced.where(priced.isfinite(), 0).abs().sum()) / wanted or 1.0
    while not enough(high) and math.isfinite(high):
        low, high = high, 2 * high
    for _ in range(_HALVINGS):
        between = (low + high) / 2
        low, high = (low, between) if enough(between) else (between, high)
    return high


def improved(saved: Tensor, priced: Tensor, chosen: Tensor, wanted: Tensor) -> Tensor:
    """Return a choice (I,) that saves enough with single options exchanged for cheaper ones while it still does.

    Args:
        saved: (K, I, O), of each of K quantities.
        priced: (I, O); both from `padded`, with 0 and infinity.
        wanted: (K,) float64, of each quantity.
    """
    while True:
        own = saved.gather(2, chosen.expand(len(saved), -1)[..., None])  # (K, I, 1)
        enough = (saved >= own - (own.sum(1, keepdim=True) - wanted[:, None, None])).all(0)
        cheaper = priced.where(enough, torch.inf).min(1)
        gains = priced.gather(1, chosen[:, None]).squeeze(1) - cheaper.values
        item = gains.argmax()
        if not gains[item] > 0:
            return chosen
        chosen = chosen.scatter(0, item[None], cheaper.indices[item][None])


def _by_shares(
    savings: Sequence[Sequence[int]], prices: Sequence[Sequence[float]], wanted: int, share: int
) -> list[int] | None:
    """Return the choice of `knapsack`, in units of `share`; None if none saves enough."""
    last = -(-wanted // share)  # index for every sufficient saving
    places = torch.arange(last + 1)
    total = torch.full((last + 1,), torch.inf, dtype=torch.float64)  # lowest price by units saved so far
    total[0] = 0
    beyond = torch.full((last + 1,), last * share - wanted)  # what that choice saves beyond its shares
    steps = []
    for saved, priced_at in zip(savings, prices, strict=True):
        shares, rests = torch.tensor(saved) // share, torch.tensor(saved) % share
        best, choice = torch.full_like(total, torch.inf), torch.zeros(last + 1, dtype=torch.long)
        end = 0  # from where the last place is reached
        for option, price in enumerate(priced_at):
            priced, fills = total + price, beyond + rests[option] >= share  # the rests make up another share
            for more, these in enumerate((~fills, fills)):
                if not these.any():
                    continue
                shift, reached = min(int(shares[option]) + more, last), priced.where(these, torch.inf)
                short, code = reached[: last - shift], 2 * option + more
                choice[shift:last].masked_fill_(short < best[shift:last], code)
                torch.minimum(short, best[shift:last], out=best[shift:last])
                nearest = last - shift + int(reached[last - shift :].argmin())
                if reached[nearest] < best[last]:
                    best[last], choice[last], end = reached[nearest], code, nearest
        options, filled = choice // 2, choice % 2
        origin = (places - shares[options] - filled).clamp_min(0)  # of places that are not reached nothing is asked
        origin[last] = end
        steps.append((options, origin))
        total, beyond = best, beyond[origin] + rests[options] - share * filled
    if total[last].isinf():
        return None
    chosen = []
    place = last
    for options, origin in reversed(steps):
        chosen.append(int(options[place]))
        place = int(origin[place])
    return chosen[::-1]
