"""What a rival makes."""

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Result:
    """A smaller model and its size.

    Attributes:
        model: takes `input_ids` (n, S) and gives `.logits` (n, S, V); has `.config` and `.device`.
        parameters: all of it, tied ones counted once, what was added included.
        prunable_ratio_removed: of the attention and MLP projections, less what was added.
    """

    model: nn.Module
    parameters: int
    prunable_ratio_removed: float
