"""Chooses the candidate of a sweep to publish: the fastest, smallest or best of those that pass their gates.

So the gates are the limits of the choice. Their bounds allow for the number of candidates, because the best is chosen
on the rows that they judge (see numprune.serving.gates).
"""

from collections.abc import Iterable, Sequence

from numprune.flows.names import Objective
from numprune.serving.front import Point
from numprune.serving.report import Outcome


def best(objective: Objective, outcomes: Sequence[str], points: Sequence[Point | None]) -> int | None:
    """The index of the best candidate of those that pass, the first among equals; None without one."""
    passing = {
        index: one
        for index, (outcome, one) in enumerate(zip(outcomes, points, strict=True))
        if outcome == "pass" and one is not None
    }

    def rank(index: int) -> float:
        found = passing[index]
        return {"fastest": -found.speed.value, "smallest": found.bytes.value, "best-quality": found.loss.value}[
            objective
        ]

    return min(passing, key=rank, default=None)


def without_one(outcomes: Iterable[str]) -> Outcome | None:
    """The outcome of candidates none of which passes: that of those which another run may settle, or fail.

    None if all have errors: no gate has refused any of them.
    """
    seen = set(outcomes)
    if seen == {"error"}:
        return None
    settled_later: tuple[Outcome, ...] = ("invalid environment", "inconclusive")
    return next((outcome for outcome in settled_later if outcome in seen), "fail")
