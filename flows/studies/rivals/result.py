"""The result of a rival method."""

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Result:
    """A smaller model and its size.

    Attributes:
        model: takes `input_ids` (n, S) and gives `.logits` (n, S, V); has `.config` and `.device`.
        parameters: total, with tied ones counted once and added ones included.
        prunable_ratio_removed: share of the attention and MLP projections, less added parameters.
    """

    model: nn.Module
    parameters: int
    prunable_ratio_removed: float
