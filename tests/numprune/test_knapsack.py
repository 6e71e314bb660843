"""The knapsack against all choices of small tables, and with and without the relaxation that leaves options out."""

import itertools
import math

import pytest
import torch

from numprune import knapsack as knapsacks
from numprune.knapsack import knapsack, lower_bound, padded


@pytest.mark.parametrize("wanted", [0, 1, 7, 20, 33])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_knapsack_is_the_cheapest_of_all_choices_that_save_enough(wanted, seed):
    generator = torch.Generator().manual_seed(seed)
    savings = torch.randint(0, 10, (4, 3), generator=generator).tolist()
    prices = torch.rand(4, 3, generator=generator).tolist()  # nothing convex, nothing ordered
    every = list(itertools.product(range(3), repeat=4))

    def total(table, chosen):
        return sum(row[option] for row, option in zip(table, chosen, strict=True))

    chosen = knapsack(savings, prices, wanted)
    enough = [other for other in every if total(savings, other) >= wanted]
    if enough:
        assert total(savings, chosen) >= wanted
        assert total(prices, chosen) == pytest.approx(min(total(prices, other) for other in enough))
    else:
        assert total(savings, chosen) == max(total(savings, other) for other in every)


def test_what_is_left_of_a_share_is_not_lost(monkeypatch):
    """What a choice saves exactly is wanted; were the rests of four items lost, dearer choices would be needed."""
    monkeypatch.setattr(knapsacks, "_SHARES", 100)
    generator = torch.Generator().manual_seed(0)
    every = torch.cartesian_prod(*[torch.arange(4)] * 4)
    excess = []
    for _ in range(30):
        savings = (1000 * torch.rand(4, 4, generator=generator).cumsum(1)).long()
        prices = torch.rand(4, 4, generator=generator, dtype=torch.float64).cumsum(1)
        saved, price = (table[torch.arange(4), every].sum(1) for table in (savings, prices))
        wanted = int(saved[torch.randint(len(every), (1,), generator=generator)])
        found = torch.tensor(knapsack(savings.tolist(), prices.tolist(), wanted))
        assert savings[torch.arange(4), found].sum() >= wanted
        excess.append(prices[torch.arange(4), found].sum() / price[saved >= wanted].min() - 1)
    assert min(excess) > -1e-12
    assert torch.stack(excess).mean() < 0.01


def tables(seed, items, options, common):
    """Savings, multiples of `common`, and prices that rise with them, as those of a block's sizes do."""
    generator = torch.Generator().manual_seed(seed)
    savings = common * torch.randint(0, 40, (items, options), generator=generator).sort(1).values
    prices = torch.rand(items, options, generator=generator, dtype=torch.float64).square().cumsum(1)
    return savings.tolist(), (prices * 10.0 ** torch.randint(-6, 3, (items, 1), generator=generator)).tolist()


@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.95])
@pytest.mark.parametrize("seed", range(5))
def test_options_are_left_out_without_changing_the_choice(seed, share, monkeypatch):
    savings, prices = tables(seed, 6, 12, 64)
    wanted = int(share * sum(map(max, savings)))
    chosen = knapsack(savings, prices, wanted)
    tried = []

    def all_options(*given):
        known, candidates = relaxed(*given)
        tried.append(sum(map(len, candidates)))
        return known, [list(range(12))] * 6

    relaxed = knapsacks._relaxed
    monkeypatch.setattr(knapsacks, "_relaxed", all_options)
    assert knapsack(savings, prices, wanted) == chosen
    assert tried[0] < 6 * 12 / 2


def test_what_shares_cannot_reach_is_reached(monkeypatch):
    """Of choices with the same number of missing shares only the cheapest is followed, and it may save too little."""
    monkeypatch.setattr(knapsacks, "_SHARES", 3)
    for seed, share in itertools.product(range(20), (0.5, 0.9, 0.99, 1.0)):
        savings, prices = tables(seed, 5, 6, 1)
        wanted = int(share * sum(map(max, savings)))
        chosen = knapsack(savings, prices, wanted)
        assert sum(row[option] for row, option in zip(savings, chosen, strict=True)) >= wanted
        assert math.isfinite(sum(row[option] for row, option in zip(prices, chosen, strict=True)))


def test_the_lower_bound_is_the_optimum_with_fractions():
    saved = padded([[10, 6, 5, 0], [6, 0]], 0.0)
    priced = padded([[9.0, 4.0, 3.9, 0.0], [6.0, 0.0]], math.inf)
    for wanted, least in (
        (0, 0.0),
        (3, 3 * 4 / 6),  # of the hull, not through (5, 3.9)
        (6, 4.0),
        (9, 4 + 3 * 1),
        (16, 15.0),
        (17, math.inf),
    ):
        assert lower_bound(saved, priced, wanted) == pytest.approx(least)


@pytest.mark.parametrize("seed", range(5))
def test_no_choice_costs_less_than_the_lower_bound(seed):
    savings, prices = tables(seed, 4, 8, 1)
    for share in (0.1, 0.5, 0.9):
        wanted = int(share * sum(map(max, savings)))
        found = knapsack(savings, prices, wanted)
        price = sum(row[option] for row, option in zip(prices, found, strict=True))
        assert lower_bound(padded(savings, 0.0), padded(prices, math.inf), wanted) <= price * (1 + 1e-12)
