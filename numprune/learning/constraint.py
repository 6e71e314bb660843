"""The size constraint of the masks: an augmented Lagrangian whose target falls step by step."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from numprune.blocks import Anatomy, Block
from numprune.learning.masks import Masks
from numprune.slices import Size

Counted = Literal["parameters", "flops", "kv-bytes"]


@dataclass(frozen=True)
class Constraint:
    """The constraint: a share of the blocks' cost has to be removed.

    Attributes:
        counted: the cost: "parameters" of the blocks; "flops" per token, on average over a row;
            "kv-bytes" of the cache for a token, which MLPs and experts do not have.
        length: tokens of a row.
    """

    counted: Counted
    anatomy: Anatomy
    length: int

    @property
    def name(self) -> str:
        """The name of the cost, in words."""
        return {
            "parameters": "prunable parameters",
            "flops": f"FLOPs of the blocks for each token of {self.length}",
            "kv-bytes": "KV-cache bytes",
        }[self.counted]

    def cost(self, block: Block, size: Size) -> int:
        """Return the cost of a block of size `size`."""
        if self.counted == "parameters":
            return block.parameters(size)
        left, attends = block.resized(size), block.kind == "attention"
        if self.counted == "kv-bytes":
            cached = attends and self.anatomy.task == "causal-lm"
            return 2 * left.units * self.anatomy.head_dim * self.anatomy.bytes_per_value if cached else 0
        # As in `budget.Budget`: 2 per weight, and 4 per channel and attended token.
        looked_at = self.length // 2 if self.anatomy.task == "causal-lm" else self.length
        of_context = 4 * left.channels * looked_at if attends else 0
        return 2 * (block.parameters(size) - left.idle_parameters) + of_context

    def of_unit(self, block: Block) -> int:
        """Return the cost of one unit of a block."""
        return self.cost(block, block.size) - self.cost(block, Size(block.units - 1, block.members))

    def of_member(self, block: Block) -> float:
        """Return the cost of one member of one unit."""
        if block.members == 1:
            return 0.0
        return (self.cost(block, block.size) - self.cost(block, Size(block.units, block.members - 1))) / block.units

    @property
    def whole(self) -> int:
        """The cost of all blocks."""
        return sum(self.cost(block, block.size) for block in self.anatomy.blocks)

    def removed(self, sizes: Mapping[str, Size]) -> float:
        """Return the removed share if blocks have these sizes, by name."""
        return 1 - sum(self.cost(block, sizes[block.name]) for block in self.anatomy.blocks) / self.whole


@dataclass(frozen=True)
class Share:
    """The kept share of the cost, by mask.

    Attributes:
        of_mask: (K,), the share of each mask alone.
        fixed: the share of unmasked blocks.
    """

    of_mask: Tensor
    fixed: float

    def kept(self, masks: Masks) -> Tensor:
        """Return the kept share, weighting each mask by sigmoid(-log alpha), its own and those of the masks above."""
        return self.fixed + self.of_mask @ masks.along(torch.sigmoid(-masks.log_alpha))


def share_of(constraint: Constraint, masks: Masks) -> Share:
    """Return the shares of a model's masks."""
    of_mask = masks.costs / constraint.whole
    return Share(of_mask, 1 - float(of_mask.sum()))


class Lagrangian:
    """l1 * (s - t) + l2 * (s - t)^2, with both multipliers updated by gradient ascent.

    Args:
        rate: of the ascent.
        quadratic: initial l2. It damps oscillations of s around t, which l1 alone would overshoot in a short training.
    """

    def __init__(self, rate: float, quadratic: float) -> None:
        self._rate = rate
        self._linear, self._quadratic = 0.0, quadratic

    @property
    def multipliers(self) -> Tensor:
        """Return l1 and l2, (2,) float64."""
        return torch.tensor([self._linear, self._quadratic], dtype=torch.float64)

    @multipliers.setter
    def multipliers(self, values: Tensor) -> None:
        self._linear, self._quadratic = values.tolist()

    def penalty(self, excess: Tensor) -> Tensor:
        """Return the penalty for `excess` = s - t."""
        return self._linear * excess + self._quadratic * excess.square()

    def ascend(self, excess: float) -> None:
        """Update the multipliers along the gradient of the penalty."""
        self._linear += self._rate * excess
        self._quadratic += self._rate * excess**2
