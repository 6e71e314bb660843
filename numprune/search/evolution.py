"""A (1+n) search: the best of n neighbours of a plan replaces it if it is better.

Neighbours are compared by successive halving, as in EvoPress: all on a few rows, the better half on more. Every
neighbour is compared with the plan on the same rows, so noise of the rows is shared.
"""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from numprune.progress import Progress
from numprune.refinement import Stopped
from numprune.search.space import Space, key
from numprune.slices import Size

OFFSPRING = 8
PATIENCE = 10  # generations without gain

# Plans (n) and a slice of the rows (r) -> the divergence of each plan on each row, (n, r).
Measure = Callable[[Sequence[Mapping[str, Size]], slice], NDArray[np.float64]]


@dataclass(frozen=True)
class Found:
    """The result of a search.

    Attributes:
        plan: the best one.
        generations, candidates: how many were tried.
        before, after: mean divergence of the first plan and of the best one, on all rows of the search.
        stopped: why it ended.
    """

    plan: Mapping[str, Size]
    generations: int
    candidates: int
    before: float
    after: float
    stopped: Stopped


def search(
    space: Space,
    start: Mapping[str, Size],
    measure: Measure,
    rows: Sequence[int],
    *,
    seed: int,
    seconds: float,
    offspring: int = OFFSPRING,
) -> Found:
    """Return the best plan found.

    Args:
        space: of plans.
        start: the first plan.
        measure: of plans.
        rows: how many rows are compared in each round of a generation, ascending.
        seed: of the neighbours; with the same seed, only the time limit can change the result.
        seconds: time limit; the running generation is finished.
        offspring: neighbours in a generation; without any, the first plan is the best.
    """
    draw, deadline = random.Random(seed), time.monotonic() + seconds
    plan, seen = dict(start), {key(start)}
    (known,) = measure([plan], slice(rows[-1]))
    before = float(known.mean())
    generations = candidates = idle = 0
    stopped: Stopped = "no gain"
    with Progress(None, "search", "generation") as bar:
        while idle < PATIENCE:
            if generations and time.monotonic() > deadline:
                stopped = "time limit"
                break
            children = space.neighbours(plan, offspring, seen, draw)
            if not children:
                stopped = "no neighbours"
                break
            generations, candidates = generations + 1, candidates + len(children)
            better = _best(children, known, measure, rows)
            idle = 0 if better else idle + 1
            plan, known = better or (plan, known)
            bar.update(note=f"divergence {before:.4g} -> {known.mean():.4g}")
    return Found(plan, generations, candidates, before, float(known.mean()), stopped)


def _best(
    plans: Sequence[dict[str, Size]], known: NDArray[np.float64], measure: Measure, rows: Sequence[int]
) -> tuple[dict[str, Size], NDArray[np.float64]] | None:
    """Return the best of the plans with its divergences, or None if none is better than `known` on all rows."""
    left = [(plan, np.empty(0)) for plan in plans]
    done = 0
    for count in rows:
        more = measure([plan for plan, _ in left], slice(done, count))
        compared = [(plan, np.concatenate([had, new])) for (plan, had), new in zip(left, more, strict=True)]
        compared.sort(key=lambda one: float(one[1].mean()))
        half = compared[: max(1, len(compared) // 2)]
        left = [(plan, values) for plan, values in half if values.mean() < known[:count].mean()]
        if not left:
            return None
        done = count
    return left[0]
