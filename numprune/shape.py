"""The shape of a model, its hidden size and number of layers, and the record of how one was chosen.

No tensor library is needed.
"""

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from numprune.counted import counted

Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]


class Shape(NamedTuple):
    """A candidate; `hidden_size`: None: it stays."""

    hidden_size: int | None
    drop_layers: int


PLAIN = Shape(None, 0)


def shapes_of(hidden_sizes: Iterable[int], drop_layers: Iterable[int]) -> tuple[Shape, ...]:
    """Return all combinations, with the model's own hidden size (also 0) and number of layers among them, first."""
    sizes = dict.fromkeys([None, *(size for size in hidden_sizes if size)])
    drops = dict.fromkeys([0, *drop_layers])
    return tuple(Shape(size, dropped) for size in sizes for dropped in drops)


def shape_fields(hidden_sizes: Sequence[int], drop_layers: Sequence[int]) -> dict[str, Any]:
    """Return the fields of PruneOptions: of one shape, or of candidates if there are several sizes or numbers."""
    if len(hidden_sizes) > 1 or len(drop_layers) > 1:
        return {"shapes": shapes_of(hidden_sizes, drop_layers)}
    return {"hidden_size": next(iter(hidden_sizes), None), "drop_layers": next(iter(drop_layers), 0)}


class TriedShape(BaseModel):
    """A candidate within the ratio or the budget.

    Attributes:
        hidden_size: of the result.
        drop_layers: number of layers that it lacks.
        predicted: its price in nats per token, for ranking candidates.
        measured: divergence from the dense model on rows apart, in `ShapeChoice.unit`; None: it was not measured.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    hidden_size: Count
    drop_layers: Count
    predicted: Finite
    measured: Finite | None = None

    def __str__(self) -> str:
        measured = "not measured" if self.measured is None else f"measured {self.measured:.4g}"
        return (
            f"hidden size {self.hidden_size:,} without {counted(self.drop_layers, 'layer')}: predicted "
            f"{self.predicted:.4g}, {measured}"
        )


class ShapeChoice(BaseModel):
    """How hidden size and number of layers were chosen among candidates.

    Attributes:
        tried: all candidates within the ratio or the budget, first the chosen one, then by prediction.
        rows_apart: calibration rows on which the divergence was measured; candidates were pruned on the others.
        unit: of the divergences.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    tried: Annotated[list[TriedShape], Field(min_length=1)]
    rows_apart: Count
    unit: str

    def lines(self) -> list[str]:
        """Return a line for each candidate, the chosen one first."""
        return [f"{'chosen' if not number else 'other'} shape: {tried}" for number, tried in enumerate(self.tried)]
