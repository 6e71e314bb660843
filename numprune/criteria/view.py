"""The input of a criterion: one block."""

from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True)
class BlockView:
    """A block's consumer and the moments of its inputs.

    Attributes:
        weight: (out, D) float64, the consumer's.
        gram: (D, D) float64, E[x x^T].
        mean: (D,) float64, E[x].
        channels_per_unit: D / units.
        ratio: the requested share of the prunable parameters (the raw numerical score depends on it).
        seed: of this block, for random criteria.
        taylor: (units, members) float64, sensitivity.py's first-order score, if the criterion needs the loss's
            gradients.
        members: per unit.
        removed: how many units will be removed, if known: all other scores then only need to be higher.
        dimap: (units, members) float64, dimap.py's importances, if they are the criterion.
    """

    weight: Tensor
    gram: Tensor
    mean: Tensor
    channels_per_unit: int
    ratio: float
    seed: int
    taylor: Tensor | None = None
    members: int = 1
    removed: int | None = None
    dimap: Tensor | None = None

    @property
    def units(self) -> int:
        return self.weight.shape[1] // self.channels_per_unit

    def of_members(self) -> "BlockView":
        """Return a view whose units are this view's members."""
        taylor, dimap = (None if score is None else score.view(-1, 1) for score in (self.taylor, self.dimap))
        own = self.channels_per_unit // self.members
        return replace(self, channels_per_unit=own, members=1, taylor=taylor, dimap=dimap, removed=None)

    def unit_mean(self, channel_scores: Tensor) -> Tensor:
        """Return the mean of (D,) channel scores over each unit's channels: (units,)."""
        return channel_scores.view(-1, self.channels_per_unit).mean(1)
