"""The record of a search that refined a plan's sizes. No tensor library is needed."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from numprune.counted import counted

REFINEMENTS = ("none", "search")
MINUTES = 30.0  # the time limit of a search

Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]
Stopped = Literal["no gain", "time limit", "no neighbours"]

_WHY: dict[Stopped, str] = {
    "no gain": "until further ones brought no gain",
    "time limit": "until the time limit (another machine may get further)",
    "no neighbours": "until no untried neighbour was found",
}


class Refinement(BaseModel):
    """How a search changed the plan of the knapsack.

    Divergences are means over calibration rows, of weights refitted as by `oneshot`, from the dense model.

    Attributes:
        generations, candidates: how many were tried.
        stopped: why the search ended.
        unit: of the divergences.
        rows: on which plans were compared.
        divergence_before, divergence_after: of the knapsack's plan and of the best one, on those rows.
        rows_apart: other rows, on which a gain must be confirmed; 0: there was none.
        change_apart: mean change of the divergence there, from the knapsack's plan to the best one; None: as above.
        change_apart_upper: its one-sided 95 % bound; None: as above.
        confirmed: the bound is below 0, so the best plan is used; otherwise the knapsack's is used.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    generations: Count
    candidates: Count
    stopped: Stopped
    unit: str
    rows: Count
    divergence_before: Finite
    divergence_after: Finite
    rows_apart: Count
    change_apart: Finite | None
    change_apart_upper: Finite | None
    confirmed: bool

    def __str__(self) -> str:
        tried = (
            f"search: {counted(self.generations, 'generation')}, {counted(self.candidates, 'candidate')}, "
            f"{_WHY[self.stopped]}"
        )
        if self.change_apart is None or self.change_apart_upper is None:
            return f"{tried}; none is better than the knapsack's plan, {self.divergence_before:.4g} {self.unit}"
        verdict = "confirmed" if self.confirmed else "not confirmed, so the knapsack's plan is used"
        return (
            f"{tried}; divergence from {self.divergence_before:.4g} to {self.divergence_after:.4g} {self.unit} on "
            f"{counted(self.rows, 'calibration row')}, changed by {self.change_apart:+.4g} (at most "
            f"{self.change_apart_upper:+.4g}) on {counted(self.rows_apart, 'other row')}: {verdict}"
        )
