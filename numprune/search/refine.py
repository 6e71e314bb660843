"""Refine the sizes of the knapsack by search, and confirm the gain on rows that the search did not use."""

import logging
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from numprune.bootstrap import bootstrap_mean
from numprune.calibration import Walker
from numprune.errors import InputError
from numprune.refinement import Refinement
from numprune.search.divergence import Divergences
from numprune.search.evolution import Found, search
from numprune.search.levels import Levels
from numprune.search.space import Space
from numprune.slices import Size

logger = logging.getLogger(__name__)

MINIMUM_ROWS = 16  # half of them confirm the gain
_ROUNDS = (2, 8, 32)  # rows on which a generation is compared
_MOST_APART = 128  # rows that confirm the gain


def check_searchable(rows: int, *, resident: bool) -> None:
    """Refuse what cannot be searched. Raises InputError.

    Args:
        rows: of calibration.
        resident: the model is in memory.
    """
    if rows < MINIMUM_ROWS:
        raise InputError(
            f"refine: search compares plans on one half of the calibration rows and confirms the gain on the other; "
            f"{rows} rows are too few, use at least {MINIMUM_ROWS}"
        )
    if not resident:
        raise InputError(
            "refine: search runs the model many times and keeps the Gram matrices of all blocks in memory, which "
            "streaming avoids; use one or the other"
        )


def refined(
    walker: Walker, rows: Tensor, start: Mapping[str, Size], space: Space, levels: Levels, *, seed: int, minutes: float
) -> tuple[dict[str, Size], Refinement]:
    """Return the plan to use, and how it was found: `start`, unless rows apart confirm that another is better.

    Args:
        walker: of the dense model.
        rows: (N, S) int64 calibration tokens.
        start: the knapsack's plan.
        space: around it.
        levels: of the model's blocks.
        seed: of the search.
        minutes: its time limit.
    """
    compared, others = parts(rows)
    measure = Divergences(walker, compared, levels)
    found = search(space, start, measure, rounds(len(compared)), seed=seed, seconds=60 * minutes)
    del measure  # the dense model's predictions are large

    def apart(plans: Sequence[Mapping[str, Size]]) -> NDArray[np.float64]:
        some = others.split(len(compared))
        return np.concatenate([Divergences(walker, part, levels)(plans, slice(None)) for part in some], axis=1)

    plan, record = confirmed(found, start, apart, len(compared), walker.layers.task.unit)
    logger.info("%s", record)
    return plan, record


def parts(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows to search on, spread evenly, and others to confirm the gain on."""
    count = min(_ROUNDS[-1], len(rows) // 2)
    compared = torch.arange(count) * len(rows) // count
    others = torch.ones(len(rows), dtype=torch.bool).index_fill(0, compared, False)
    return rows[compared], rows[others][:_MOST_APART]


def rounds(rows: int) -> list[int]:
    """Return how many of the rows to search on are compared in each round of a generation."""
    return [*(count for count in _ROUNDS if count < rows), rows]


def confirmed(
    found: Found,
    start: Mapping[str, Size],
    apart: Callable[[Sequence[Mapping[str, Size]]], NDArray[np.float64]],
    rows: int,
    unit: str,
) -> tuple[dict[str, Size], Refinement]:
    """Return the best plan if it is better on rows apart, by a bound on the mean difference; otherwise `start`.

    Args:
        found: by the search from `start`, on `rows` rows.
        apart: plans (n) -> the divergence of each on each of the rows apart (n, r), in `unit`.
    """
    change = None
    if dict(found.plan) != dict(start):
        before, after = apart([start, found.plan])
        change = bootstrap_mean(after - before, np.ones(len(before)), "row")
    record = Refinement(
        generations=found.generations,
        candidates=found.candidates,
        stopped=found.stopped,
        unit=unit,
        rows=rows,
        divergence_before=_rounded(found.before),
        divergence_after=_rounded(found.after),
        rows_apart=0 if change is None else change.samples,
        change_apart=None if change is None else _rounded(change.value),
        change_apart_upper=None if change is None else _rounded(change.ci95_upper),
        confirmed=change is not None and change.ci95_upper < 0,
    )
    return dict(found.plan if record.confirmed else start), record


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")  # other digits depend on the batch size and the machine
