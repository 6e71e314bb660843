"""The knapsack under several limits against all choices of small tables that are neither convex nor ordered."""

import pytest
import torch

from numprune.knapsack import knapsack
from numprune.multi_knapsack import is_possible, multi_knapsack, saving_most, total

ITEMS = OPTIONS = 5
EVERY = torch.cartesian_prod(*[torch.arange(OPTIONS)] * ITEMS)


def tables(seed, limits):
    generator = torch.Generator().manual_seed(seed)
    savings = torch.randint(0, 60, (limits, ITEMS, OPTIONS), generator=generator)
    prices = torch.rand(ITEMS, OPTIONS, generator=generator, dtype=torch.float64).square()
    return savings, prices


def sums(table):
    """Of every choice."""
    return table[torch.arange(ITEMS), EVERY].sum(1)


def wanted_of(savings, share):
    return [int(share * table.amax(1).sum()) for table in savings]


@pytest.mark.parametrize("share", [0.5, 0.8])
@pytest.mark.parametrize("limits", [2, 3])
def test_no_limit_is_missed_and_the_cheapest_choice_is_between_the_bound_and_the_one_found(share, limits):
    excess = []
    for seed in range(4):
        savings, prices = tables(seed, limits)
        wanted = wanted_of(savings, share)
        met = torch.stack([sums(table) >= least for table, least in zip(savings, wanted, strict=True)]).all(0)
        found = multi_knapsack(savings.tolist(), prices.tolist(), wanted)
        assert (found is not None) == bool(met.any())
        if found is None:
            continue
        assert all(total(table.tolist(), found.chosen) >= least for table, least in zip(savings, wanted, strict=True))
        cheapest = float(sums(prices)[met].min())
        price = total(prices.tolist(), found.chosen)
        assert found.bound <= cheapest * (1 + 1e-9)
        assert price >= cheapest * (1 - 1e-9)
        excess.append(price / cheapest - 1)
    assert max(excess) < 0.1


def test_a_limit_that_is_met_anyway_changes_nothing():
    savings, prices = tables(0, 2)
    for share in (0.3, 0.7):
        wanted, _ = wanted_of(savings, share)
        alone = knapsack(savings[0].tolist(), prices.tolist(), wanted)
        spare = total(savings[1].tolist(), alone)
        found = multi_knapsack(savings.tolist(), prices.tolist(), [wanted, int(spare)])
        assert found is not None
        assert found.chosen == alone


def test_choices_that_cost_nothing_have_a_bound_of_nothing():
    savings = [[[0, 1, 10], [0, 10]], [[0, 9, 0], [0, 10]]]
    found = multi_knapsack(savings, [[0.0] * 3, [0.0] * 2], [11, 11])
    assert found is not None
    assert found == ([1, 1], 0.0)
    assert found.bound >= 0


@pytest.mark.parametrize("factor", [2, 7])
def test_the_unit_of_a_quantity_changes_nothing(factor):
    savings, prices = tables(3, 2)
    wanted = wanted_of(savings, 0.7)
    once = multi_knapsack(savings.tolist(), prices.tolist(), wanted)
    scaled = multi_knapsack((factor * savings).tolist(), prices.tolist(), [factor * least for least in wanted])
    assert once is not None
    assert scaled is not None
    assert scaled.chosen == once.chosen
    assert scaled.bound == pytest.approx(once.bound)


@pytest.mark.parametrize("seed", range(3))
def test_what_one_quantity_can_save_within_the_other_limit_is_exact(seed):
    savings, prices = tables(seed, 2)
    wanted = wanted_of(savings, 0.8)
    most = int(sums(savings[1])[sums(savings[0]) >= wanted[0]].max())
    chosen = saving_most(savings.tolist(), wanted, 1)
    assert total(savings[1].tolist(), chosen) == most
    for least, possible in ((most, True), (most + 1, False)):
        assert is_possible(savings.tolist(), [wanted[0], least]) is possible
        found = multi_knapsack(savings.tolist(), prices.tolist(), [wanted[0], least])
        assert (found is not None) is possible
