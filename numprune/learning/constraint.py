"""What the masks may keep: a share of a cost, held by an augmented Lagrangian whose target falls to it step by step."""

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
    """A share of what the blocks cost is to go.

    Attributes:
        counted: what is: "parameters" of the blocks; "flops" that they need for a token, on average over a row;
            "kv-bytes" of the cache for a token, which MLPs and experts do not have.
        length: tokens of a row.
    """

    counted: Counted
    anatomy: Anatomy
    length: int

    @property
    def name(self) -> str:
        """What a share is of, in words."""
        return {
            "parameters": "prunable parameters",
            "flops": f"FLOPs of the blocks for each token of {self.length}",
            "kv-bytes": "KV-cache bytes",
        }[self.counted]

    def cost(self, block: Block, size: Size) -> int:
        """Return what a block costs that is left with `size`."""
        if self.counted == "parameters":
            return block.parameters(size)
        left, attends = block.resized(size), block.kind == "attention"
        if self.counted == "kv-bytes":
            cached = attends and self.anatomy.task == "causal-lm"
            return 2 * left.units * self.anatomy.head_dim * self.anatomy.bytes_per_value if cached else 0
        # As of `budget.Budget`: 2 for each weight, and 4 for each channel and token that attention looks at.
        looked_at = self.length // 2 if self.anatomy.task == "causal-lm" else self.length
        of_context = 4 * left.channels * looked_at if attends else 0
        return 2 * (block.parameters(size) - left.idle_parameters) + of_context

    def of_unit(self, block: Block) -> int:
        """Return what goes with one unit of a block."""
        return self.cost(block, block.size) - self.cost(block, Size(block.units - 1, block.members))

    def of_member(self, block: Block) -> float:
        """Return what goes with one member of one unit."""
        if block.members == 1:
            return 0.0
        return (self.cost(block, block.size) - self.cost(block, Size(block.units, block.members - 1))) / block.units

    @property
    def whole(self) -> int:
        """What all blocks cost."""
        return sum(self.cost(block, block.size) for block in self.anatomy.blocks)

    def removed(self, sizes: Mapping[str, Size]) -> float:
        """Return the share that goes if blocks are left with these sizes, by their names."""
        return 1 - sum(self.cost(block, sizes[block.name]) for block in self.anatomy.blocks) / self.whole


@dataclass(frozen=True)
class Share:
    """What is kept of the cost, as the masks see it.

    Attributes:
        of_mask: (K,), the share of all that goes with each mask alone.
        fixed: the share of the blocks that are not masked.
    """

    of_mask: Tensor
    fixed: float

    def kept(self, masks: Masks) -> Tensor:
        """Return the share that is kept: of what a mask stands for, sigmoid(-log alpha), as of the masks above it."""
        return self.fixed + self.of_mask @ masks.along(torch.sigmoid(-masks.log_alpha))


def share_of(constraint: Constraint, masks: Masks) -> Share:
    """Return the shares of a model's masks."""
    of_mask = masks.costs / constraint.whole
    return Share(of_mask, 1 - float(of_mask.sum()))


class Lagrangian:
    """l1 * (s - t) + l2 * (s - t)^2, both multipliers found by gradient ascent.

    Args:
        rate: of the ascent.
        quadratic: l2 at first. It damps the swing of s around t, which l1 alone would overshoot in a short training.
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
        """Return what is added to the loss where `excess` = s - t."""
        return self._linear * excess + self._quadratic * excess.square()

    def ascend(self, excess: float) -> None:
        """Move the multipliers up the gradient of the penalty."""
        self._linear += self._rate * excess
        self._quadratic += self._rate * excess**2
