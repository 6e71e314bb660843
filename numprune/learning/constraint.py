"""The size constraint of the masks: an augmented Lagrangian whose target falls step by step."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from numprune.blocks import Anatomy, Block
from numprune.byte_budget import ByteBudget
from numprune.learning.masks import Masks
from numprune.learning.times import time_of_leaf
from numprune.quantization.allocation import Form, block_bytes
from numprune.slices import Size
from numprune.time_budget import TimeBudget

Counted = Literal["parameters", "flops", "bytes", "kv-bytes", "milliseconds"]


@dataclass(frozen=True)
class Constraint:
    """The constraint: a share of the blocks' cost has to be removed.

    Attributes:
        counted: the cost: "parameters" of the blocks; "flops" per token, on average over a row;
            "bytes" of the blocks' weights as they are stored; "kv-bytes" of the cache for a token, which MLPs and
            experts do not have; "milliseconds", as measured.
        length: tokens of a row.
        budget: of "bytes" or "milliseconds".
    """

    counted: Counted
    anatomy: Anatomy
    length: int
    budget: ByteBudget | TimeBudget | None = None

    @property
    def name(self) -> str:
        """The name of the cost, in words."""
        return {
            "parameters": "prunable parameters",
            "flops": f"FLOPs of the blocks for each token of {self.length}",
            "bytes": "bytes of the blocks",
            "kv-bytes": "KV-cache bytes",
            "milliseconds": "time of the blocks",
        }[self.counted]

    def cost(self, block: Block, size: Size) -> int:
        """Return the cost of a block of size `size`; a time is in nanoseconds, and its size must have been measured."""
        if self.counted == "parameters":
            return block.parameters(size)
        if isinstance(self.budget, TimeBudget):
            return self.budget.cost(block, size)
        if self.budget is not None:
            return block_bytes(block, Form(size, None), self.budget.value)
        left, attends = block.resized(size), block.kind == "attention"
        if self.counted == "kv-bytes":
            cached = attends and self.anatomy.task == "causal-lm"
            return 2 * left.units * self.anatomy.head_dim * self.anatomy.bytes_per_value if cached else 0
        # As in `budget.Budget`: 2 per weight, and 4 per channel and attended token.
        looked_at = self.length // 2 if self.anatomy.task == "causal-lm" else self.length
        of_context = 4 * left.channels * looked_at if attends else 0
        return 2 * (block.parameters(size) - left.idle_parameters) + of_context

    def of_unit(self, block: Block) -> float:
        """Return the cost of one unit of a block, on average if it differs."""
        if isinstance(self.budget, TimeBudget):
            return block.members * time_of_leaf(self.budget, block)
        return self.cost(block, block.size) - self.cost(block, Size(block.units - 1, block.members))

    def of_member(self, block: Block) -> float:
        """Return the cost of one member of one unit, on average if it differs."""
        if block.members == 1:
            return 0.0
        if isinstance(self.budget, TimeBudget):
            return time_of_leaf(self.budget, block)
        return (self.cost(block, block.size) - self.cost(block, Size(block.units, block.members - 1))) / block.units

    @property
    def whole(self) -> int:
        """The cost of all blocks."""
        return sum(self.cost(block, block.size) for block in self.anatomy.blocks)

    def ratio(self, asked: float) -> float:
        """Return the share to remove: what the budget demands, otherwise `asked`."""
        if self.budget is None:
            return asked
        around = self.budget.around(self.anatomy) if isinstance(self.budget, TimeBudget) else self.budget.around
        return 1 - (self.budget.limit - around) / self.whole

    def narrowed(self, hidden_size: int) -> "Constraint":
        """Return the constraint on a model with another hidden size."""
        return replace(self, anatomy=self.anatomy.narrowed(hidden_size))

    @property
    def of_coordinate(self) -> float:
        """The cost of one coordinate of the residual stream."""
        return (self.whole - self.narrowed(0).whole) / self.anatomy.hidden_size

    def removed(self, sizes: Mapping[str, Size], hidden_size: int | None = None) -> float:
        """Return the removed share if blocks have these sizes, by name, and the model this hidden size."""
        blocks = self.anatomy.blocks if hidden_size is None else self.narrowed(hidden_size).anatomy.blocks
        return 1 - sum(self.cost(block, sizes[block.name]) for block in blocks) / self.whole


@dataclass(frozen=True)
class Share:
    """The kept share of a cost to which each mask adds its own part: all but time.

    Attributes:
        of_mask: (K,), the share of each mask of a block alone.
        fixed: the share of unmasked blocks.
        scaled: the part of `of_mask` that is proportional to the hidden size.
        fixed_scaled: that of `fixed`.
    """

    of_mask: Tensor
    fixed: float
    scaled: Tensor
    fixed_scaled: float

    def kept(self, masks: Masks) -> Tensor:
        """Return the kept share, weighting each mask by sigmoid(-log alpha), its own and those of the masks above.

        What is proportional to the hidden size is also weighted by the mean over the residual stream's masks.
        """
        soft = torch.sigmoid(-masks.log_alpha)
        along = masks.along(soft)
        kept = self.fixed + self.of_mask @ along
        if masks.stream is None:
            return kept
        return kept - (1 - masks.of_stream(soft).mean()) * (self.fixed_scaled + self.scaled @ along)


def share_of(constraint: Constraint, masks: Masks) -> Share:
    """Return the shares of a model's masks, of any cost but time (`TimedShare`)."""
    whole = constraint.whole

    def of_masks(constraint: Constraint) -> Tensor:
        blocks = {block.name: block for block in constraint.anatomy.blocks}
        costs = {
            block.name: (constraint.of_unit(blocks[block.name]), constraint.of_member(blocks[block.name]))
            for block in masks.blocks
        }
        return masks.spread(costs).to(masks.costs) / whole

    of_mask = of_masks(constraint)
    fixed = 1 - float(of_mask.sum())
    if masks.stream is None:
        return Share(of_mask, fixed, torch.zeros_like(of_mask), 0.0)
    without = constraint.narrowed(0)
    rest = of_masks(without)
    return Share(of_mask, fixed, of_mask - rest, fixed - (without.whole / whole - float(rest.sum())))


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
