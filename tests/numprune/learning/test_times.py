"""Measured time as the cost of masks: interpolated in training, met by measured sizes."""

import dataclasses
import itertools
import math

import pytest
import torch

from numprune.anatomy import read_anatomy
from numprune.axes import Limits
from numprune.curves import error_at
from numprune.errors import InputError
from numprune.learning import check_learning, learn, vib
from numprune.learning.constraint import Constraint
from numprune.learning.masks import Masks
from numprune.learning.rounding import _curve, rounded, sizes_under
from numprune.learning.times import TimedShare
from numprune.options import PruneOptions
from numprune.pruning import prune
from numprune.target import allowed_sizes
from numprune.time_budget import PER_MS, TimeBudget
from tests.conftest import build_tiny
from tests.numprune.learning.test_vib import LENGTH, ROWS, SELECTION, TOKENS
from tests.numprune.test_time_budget import ANATOMY, TARGET, milliseconds, table

AXES = ("kv-groups", "channels")
WHOLE = {block.name: block.size for block in ANATOMY.blocks}


def share(block, size):
    return size.units * size.members / (block.units * block.members)


def options_of(budget, **changes):
    given = {
        "ratio": 0.0,
        "allocation": "error",
        "compensation": "none",
        "axes": AXES,
        "target": TARGET,
        "time_budget": budget,
    }
    return PruneOptions(criterion="vib", **{**given, **changes})


def noisy(seed):
    """Times that rise with the size, but not everywhere."""
    generator = torch.Generator().manual_seed(seed)
    return table(lambda block, size: 0.2 + share(block, size) + 0.4 * float(torch.rand(1, generator=generator)))


def masks_of(times, limit_ms=5.0):
    budget = TimeBudget(limit_ms, {64: times}, "torch")
    constraint, options = Constraint("milliseconds", ANATOMY, 16, budget), options_of(budget)
    masks = Masks(vib._masked(constraint, options), seed=0)
    return constraint, masks, options, TimedShare.of(budget, ANATOMY, masks, sizes_under(constraint, options))


@torch.no_grad()
def keep(masks, shares):
    """Have the masks of a block keep a share of its units, and all units of other blocks."""
    masks.mean.fill_(1)
    for name, values in masks.by_block(masks.log_variance).items():
        values.fill_(-torch.tensor(shares.get(name, 1 - 1e-9)).logit())


@pytest.mark.parametrize(
    ("kept", "ms"),
    [
        (1.0, 1.5),
        (0.5, 0.75),  # measured
        (0.6, 0.75 + 0.4 * (1.0625 - 0.75)),
        (0.1, 0.5625),  # nothing smaller was measured
    ],
)
def test_a_block_takes_the_time_between_those_of_measured_sizes(kept, ms):
    _, masks, _, found = masks_of(table(lambda block, size: 0.5 + share(block, size) ** 2))
    keep(masks, {"layers.0.mlp": min(kept, 1 - 1e-6)})
    assert found.kept(masks).item() == pytest.approx((3 * 1.5 + ms) / 6, abs=1e-5)


def test_the_gradient_is_the_local_slope_of_the_time():
    _, masks, _, found = masks_of(table(lambda block, size: 0.5 + share(block, size) ** 2))
    keep(masks, {"layers.0.mlp": 0.6, "layers.1.mlp": 0.1})
    (gradient,) = torch.autograd.grad(found.kept(masks), [masks.log_variance])
    by_block = masks.by_block(gradient)
    slope = (1.0625 - 0.75) / 0.25 / 6
    assert by_block["layers.0.mlp"].sum().item() == pytest.approx(-slope * 0.6 * 0.4, rel=1e-4)
    assert by_block["layers.1.mlp"].abs().max() == 0


def test_a_faster_larger_size_replaces_a_smaller_one():
    times = {0.25: 0.5, 0.5: 1.0, 0.75: 2.0, 1.0: 1.5}
    _, masks, _, found = masks_of(table(lambda block, size: times[share(block, size)]))
    for kept, ms in ((0.75, 1.5), (0.9, 1.5), (0.6, 1.2)):
        keep(masks, {"layers.1.mlp": kept})
        assert found.kept(masks).item() == pytest.approx((4.5 + ms) / 6, abs=1e-5)


def test_a_unit_counts_its_mean_share_of_the_time_that_can_be_saved():
    constraint, *_ = masks_of(table(lambda block, size: 0.5 + share(block, size) ** 2))
    attention, mlp = ANATOMY.blocks[:2]
    assert constraint.of_unit(mlp) == pytest.approx((1.5 - 0.5625) * PER_MS / 48, rel=1e-6)
    assert constraint.of_unit(attention) == pytest.approx((1.5 - 0.75) * PER_MS, rel=1e-6)
    slower = TimeBudget(5.0, {64: table(lambda _, size: 2.0 - 0.01 * size.units)}, "torch")
    assert Constraint("milliseconds", ANATOMY, 16, slower).of_unit(mlp) == 0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("part", [0.3, 0.7])
def test_masks_are_rounded_to_the_cheapest_measured_sizes_within_the_budget(seed, part):
    times = noisy(seed)
    constraint, masks, options, _ = masks_of(times)
    allowed = sizes_under(constraint, options)
    names = [block.name for block in ANATOMY.blocks]
    every = [dict(zip(names, sizes, strict=True)) for sizes in itertools.product(*(allowed[name] for name in names))]
    least, whole = min(milliseconds(times, sizes) for sizes in every), milliseconds(times, WHOLE)
    constraint = dataclasses.replace(
        constraint, budget=TimeBudget(least + part * (whole - least), {64: times}, "torch")
    )
    with torch.no_grad():
        masks.log_variance.add_(3 * torch.randn(len(masks.weights), generator=torch.Generator().manual_seed(seed)))
    found = rounded(constraint, masks, dataclasses.replace(options, ratio=constraint.ratio(0.0)))
    assert milliseconds(times, found.sizes) <= constraint.budget.limit_ms
    assert all(found.sizes[name] in allowed[name] for name in names)
    errors = {block.name: torch.zeros(block.units + 1, block.members).double() for block in ANATOMY.blocks}
    errors |= {name: _curve(*(part.detach().double() for part in parts)) for name, parts in masks.prices().items()}

    def price(sizes):
        return math.fsum(error_at(errors, block, sizes[block.name]) for block in ANATOMY.blocks)

    within = [sizes for sizes in every if milliseconds(times, sizes) <= constraint.budget.limit_ms - 1e-5]
    assert price(found.sizes) <= min(map(price, within)) + 1e-9


@pytest.mark.slow
def test_a_budget_of_time_is_met():
    model = build_tiny(num_hidden_layers=3)
    anatomy = read_anatomy(model.config)
    allowed = allowed_sizes(anatomy, TARGET, Limits())
    times = table(share, 1.0, anatomy, allowed)
    budget = TimeBudget(4.6, {64: times}, "torch")
    options = options_of(budget)
    found = learn(model, ROWS, SELECTION, options, "faster", TOKENS // 4, counted="milliseconds")
    assert found.record.constraint == "milliseconds"
    assert 0.4 <= found.record.removed < 0.5
    assert (found.plan.ratio, found.plan.time_budget) == (0, budget)
    sizes = found.plan.sizes()
    assert 4.2 < budget.predicted(anatomy.keeping(sizes)).ms <= 4.6
    pruned = read_anatomy(prune(model, ROWS[:8], options, plan=found.plan).model.config)
    assert {block.name: block.size for block in pruned.blocks} == sizes


@pytest.mark.parametrize(
    ("more", "counted", "said"),
    [
        ({}, "parameters", "budget: it limits milliseconds, and the constraint is parameters; leave one of them out"),
        ({"time_budget": None, "ratio": 0.3}, "milliseconds", "constraint milliseconds: they are limited by a budget,"),
        ({"ratio": 0.3}, "milliseconds", r"ratio is 0\.3, and a budget is given"),
        ({"axes": (*AXES, "hidden-size")}, "milliseconds", "axes: a budget is met by units alone; leave out hidden-si"),
        ({"axes": (*AXES, "query-heads")}, "milliseconds", "axes: the timings have no attention with fewer query-head"),
        (
            {"time_budget": TimeBudget(9.0, {64: noisy(0)}, "torch")},
            "milliseconds",
            "the model takes .* ms as it is: nothing has to go",
        ),
        (
            {"time_budget": TimeBudget(1.1, {64: noisy(0)}, "torch")},
            "milliseconds",
            "the budget is 1.1 ms@.*, but embeddings, head and the quickest measured size",
        ),
    ],
)
def test_budgets_that_masks_cannot_meet_are_refused(more, counted, said):
    options = options_of(TimeBudget(5.4, {64: noisy(0)}, "torch"), **more)
    with pytest.raises(InputError, match=said):
        check_learning(ANATOMY, options, counted, LENGTH)
