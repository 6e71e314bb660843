import itertools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from numprune.allocation import check_ratio, uniform
from numprune.axes import AXES, DEFAULT_AXES, Limits
from numprune.budget import budget_of
from numprune.errors import InputError
from numprune.slices import Size
from numprune.splits import Split, priced, splits_meeting
from numprune.target import Target, allowed_sizes
from tests.numprune.test_allocation import anatomy, column, random_errors, removed


def flat(base, attention, mlp):
    """Error curves that rise by the same for every unit of a kind."""
    return {
        block.name: column(torch.arange(block.units + 1) * (attention if block.kind == "attention" else mlp))
        for block in base.blocks
    }


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    ratio=st.floats(0, 0.95),
    align=st.sampled_from([1, 8, 64]),
    groups=st.sampled_from([1, 2, 4, 8]),
    seed=st.integers(0, 99),
    axes=st.sampled_from([DEFAULT_AXES, tuple(AXES)]),
)
def test_splits_are_all_that_meet_the_ratio_and_a_near_cheapest_one_is_chosen(ratio, align, groups, seed, axes):
    base = anatomy(num_hidden_layers=2, num_key_value_heads=groups, intermediate_size=320)
    allowed, errors = allowed_sizes(base, Target(align=align), Limits(axes)), random_errors(base, seed)
    try:
        check_ratio(base, ratio, allowed)
        splits = splits_meeting(base, ratio, allowed)
    except InputError:
        return
    half_a_step = align / 2 * sum(block.parameters_per_unit for block in base.of_kind("mlp"))
    short = {}  # by (size of attention, channels), every pair there is
    for attention, mlp in itertools.product(allowed["layers.0.attention"], allowed["layers.0.mlp"]):
        missed = removed(base, Split(attention, mlp.units, 0).sizes(base)) - ratio
        short[attention, mlp.units] = abs(missed) * budget_of(base).prunable_parameters
    found = {(split.attention, split.mlp_channels) for split in splits}
    assert found <= {pair for pair, parameters in short.items() if parameters <= half_a_step * (1 + 1e-9)}
    assert found >= {pair for pair, parameters in short.items() if parameters < half_a_step * (1 - 1e-9)}
    assert len({split.attention for split in splits}) == len(splits)
    prices = priced(splits, base, errors)
    chosen, *others = prices
    assert chosen == next(split for split in splits if prices[split] <= 1.1 * min(prices.values()))
    assert others == sorted(others, key=prices.__getitem__)
    assert uniform(base, ratio, allowed, errors) == chosen.sizes(base)


@pytest.mark.parametrize(("attention", "mlp", "groups"), [(1000, 0.1, 4), (1, 1, 1)])
def test_expensive_groups_stay_and_cheap_ones_go(attention, mlp, groups):
    base = anatomy()
    allowed = allowed_sizes(base, Target(), Limits())
    kept = uniform(base, 0.3, allowed, flat(base, attention, mlp))
    assert kept["layers.0.attention"] == Size(groups, 2)
    assert uniform(base, 0.3, allowed)["layers.0.attention"].units == 3  # without prices the nearest to 0.7 * 4


@pytest.mark.parametrize(("factor", "groups"), [(0.5, 1), (0.9, 3), (1.1, 3), (2, 4)])
def test_prices_within_a_tenth_of_the_cheapest_leave_the_most_even_split(factor, groups):
    """Curves that cost what the parameters cost, those of attention times `factor`."""
    base = anatomy()
    group, channel = (base.of_kind(kind)[0].parameters_per_unit for kind in ("attention", "mlp"))
    kept = uniform(base, 0.3, allowed_sizes(base, Target(), Limits()), flat(base, factor * group, channel))
    assert kept["layers.0.attention"] == Size(groups, 2)


def test_rounding_to_the_alignment_does_not_lower_a_price():
    """A group costs what its parameters cost in MLP channels, so that no split is cheaper than another."""
    base = anatomy()
    group, channel = (base.of_kind(kind)[0].parameters_per_unit for kind in ("attention", "mlp"))
    splits = splits_meeting(base, 0.3, allowed_sizes(base, Target(align=128), Limits()))
    assert len(splits) == 4
    assert len({removed(base, split.sizes(base)) for split in splits}) > 1
    prices = [split.price(base, flat(base, group, channel)) for split in splits]
    assert prices == pytest.approx([0.3 * budget_of(base).prunable_parameters] * 4)


def test_a_single_kv_group_leaves_nothing_to_choose():
    base = anatomy(num_key_value_heads=1)
    splits = splits_meeting(base, 0.2, allowed_sizes(base, Target(), Limits()))
    assert [split.attention for split in splits] == [Size(1, 8)]


def test_the_nearest_ratios_are_named_if_none_meets_it():
    base = anatomy(num_key_value_heads=2, intermediate_size=64)
    allowed = allowed_sizes(base, Target(), Limits())
    message = (
        "uniform allocation cannot remove 0.3 of the prunable parameters: one KV group of every layer is 0.385 of "
        "them, more than the MLPs can offset; choose ratio 0.202 or 0.385, or allocation error"
    )
    with pytest.raises(InputError, match=re.escape(message)):
        uniform(base, 0.3, allowed)
    with pytest.raises(InputError, match=r"parameters: the MLPs keep their width; choose ratio 0.154 or 0.308"):
        uniform(base, 0.3, allowed_sizes(base, Target(), Limits(("kv-groups", "query-heads"))))
    for ratio in (0.202, 0.385):
        assert removed(base, uniform(base, ratio, allowed)) == pytest.approx(ratio, abs=1e-3)
