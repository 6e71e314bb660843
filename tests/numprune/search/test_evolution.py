"""The search over plans, with divergences that are known."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from numprune.axes import Limits
from numprune.blocks import Block
from numprune.options import PruneOptions
from numprune.refinement import Refinement
from numprune.search.evolution import OFFSPRING, PATIENCE, Found, search
from numprune.search.refine import confirmed
from numprune.search.space import Space
from numprune.slices import Size
from numprune.target import Target, allowed_sizes
from tests.numprune.search.test_space import anatomy_of, parameters, random_errors, space_of

ROUNDS = (2, 8, 32)
OPTIONS = PruneOptions(0.4, allocation="error", target=Target(align=8))


def tried(space, start, measure, **options):
    return search(space, start, measure, ROUNDS, **{"seed": 0, "seconds": math.inf, **options})


def measure_of(divergence, noise=0.0):
    """Divergences that differ from row to row as much for all plans, and by noise for each."""

    def measure(plans, rows):
        where = np.arange(32)[rows]
        found = []
        for plan in plans:
            spread = np.random.default_rng([abs(hash(tuple(plan.values()))) % 2**32]).standard_normal(32)
            found.append(divergence(plan) + 0.1 * where + noise * spread[where])
        return np.array(found)

    return measure


def distance(goal):
    return lambda plan: sum((plan[name].units - size.units) ** 2 for name, size in goal.items()) / 100


def toy():
    """Two MLPs, whose losses do not add up: the second is cheap only while the first is large."""
    anatomy = anatomy_of(layers=2)
    whole = {block.name: block.size for block in anatomy.blocks}
    start = {**whole, "layers.0.mlp": Size(24), "layers.1.mlp": Size(88)}
    allowed = allowed_sizes(anatomy, Target(align=8), Limits(axes=("channels",)))
    limit = parameters(anatomy, start)
    space = Space.around(anatomy, start, allowed, random_errors(anatomy, 0), Block.parameters, limit)

    def divergence(plan):
        one, other = (plan[f"layers.{layer}.mlp"].units / 96 for layer in range(2))
        return (1 - one) ** 2 + (1 - other) ** 2 * (2 - one)

    return anatomy, space, start, divergence


@pytest.mark.parametrize("seed", range(5))
def test_two_blocks_end_at_the_best_plan_of_all(seed):
    anatomy, space, start, divergence = toy()
    ladders = [[rung.size for rung in space.ladders[block.name]] for block in anatomy.blocks]
    every = [dict(zip(start, sizes, strict=True)) for sizes in itertools.product(*ladders)]
    best = min((plan for plan in every if parameters(anatomy, plan) <= space.limit), key=divergence)
    assert divergence(best) < 0.8 * divergence(start)
    found = tried(space, start, measure_of(divergence), seed=seed)
    assert found.plan == best
    assert found.after == pytest.approx(divergence(best) + 0.1 * np.arange(32).mean())
    assert found.stopped == "no neighbours"


def test_without_offspring_the_first_plan_stays():
    _, space, start, divergence = toy()
    found = tried(space, start, measure_of(divergence), offspring=0)
    assert found.plan == start
    assert (found.generations, found.candidates, found.before) == (0, 0, found.after)


@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_the_result_is_never_worse_and_the_seed_decides_it(noise):
    space, start = space_of(anatomy_of(), OPTIONS)
    goal = {name: Size(4 if name.endswith("attention") else 48) for name in start}
    measure = measure_of(distance(goal), noise)
    first, again, other = (tried(space, start, measure, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert other.plan != start
    assert first.after < first.before
    assert space.cost(first.plan) <= space.limit


def test_later_rounds_compare_the_better_half_with_the_plan():
    space, start = space_of(anatomy_of(layers=6), replace(OPTIONS, target=Target(align=2)))
    asked: list[tuple[int, slice]] = []
    measure = measure_of(distance(start), 0.0)

    def counted(plans, rows):
        asked.append((len(plans), rows))
        return measure(plans, rows)

    found = tried(space, start, counted)  # the start is the best
    assert found.plan == start
    assert (found.generations, found.stopped) == (PATIENCE, "no gain")
    assert asked == [(1, slice(32)), *[(OFFSPRING, slice(0, 2))] * PATIENCE]  # nothing better is compared further
    asked.clear()

    def improving(plans, rows):  # whatever comes later is better
        asked.append((len(plans), rows))
        return np.array([[-len(asked) - index / 10] * len(np.arange(32)[rows]) for index, _ in enumerate(plans)])

    tried(space, start, improving, seconds=0)
    assert asked[1:] == [(8, slice(0, 2)), (4, slice(2, 8)), (2, slice(8, 32))]


def test_a_time_limit_ends_the_search_after_the_running_generation():
    space, start = space_of(anatomy_of(), OPTIONS)
    goal = {name: Size(4 if name.endswith("attention") else 48) for name in start}
    found = tried(space, start, measure_of(distance(goal)), seconds=0)
    assert (found.generations, found.candidates, found.stopped) == (1, OFFSPRING, "time limit")


@pytest.mark.parametrize(
    ("gain", "noise", "is_confirmed"), [(0.1, 0.05, True), (0.01, 0.2, False), (-0.1, 0.05, False)]
)
def test_only_a_gain_on_other_rows_replaces_the_plan(gain, noise, is_confirmed):
    start, better = {"layers.0.mlp": Size(8)}, {"layers.0.mlp": Size(16)}
    found = Found(better, 3, 24, before=1.0, after=0.5, stopped="no gain")
    values = np.random.default_rng(0)
    rows = 1 + values.random(24)
    change = values.standard_normal(24)
    change = noise * (change - change.mean()) - gain  # of exactly this mean

    def apart(plans):
        return np.stack([rows if plan == start else rows + change for plan in plans])

    plan, record = confirmed(found, start, apart, 32, "nats/token")
    assert record.confirmed == is_confirmed
    assert plan == (better if is_confirmed else start)
    assert record.change_apart == pytest.approx(-gain)
    assert record.change_apart_upper > record.change_apart
    assert (record.rows, record.rows_apart, record.divergence_after) == (32, 24, 0.5)
    assert str(record).endswith(": confirmed" if is_confirmed else ": not confirmed, so the knapsack's plan is used")


def test_the_record_in_words():
    record = Refinement(
        generations=31,
        candidates=248,
        stopped="no gain",
        unit="nats/token",
        rows=32,
        divergence_before=0.1526,
        divergence_after=0.1443,
        rows_apart=96,
        change_apart=-0.0061,
        change_apart_upper=-0.0032,
        confirmed=True,
    )
    assert str(record) == (
        "search: 31 generations, 248 candidates, until further ones brought no gain; divergence from 0.1526 to 0.1443 "
        "nats/token on 32 calibration rows, changed by -0.0061 (at most -0.0032) on 96 other rows: confirmed"
    )


def test_a_search_that_finds_nothing_says_so():
    start = {"layers.0.mlp": Size(8)}
    found = Found(start, 10, 80, before=1.0, after=1.0, stopped="no gain")
    plan, record = confirmed(found, start, lambda _: pytest.fail("measured"), 32, "nats/token")
    assert plan == start
    assert record.rows_apart == 0
    assert not record.confirmed
    assert record.change_apart is None
    assert "none is better than the knapsack's plan, 1 nats/token" in str(record)
