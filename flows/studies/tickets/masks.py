"""Masks of the prunable matrices: what is kept of a model, in whole units or single weights."""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from numprune.allocation import keep_highest, uniform
from numprune.blocks import Anatomy, Block
from numprune.schedules.scores import magnitude
from numprune.slices import Kept
from numprune.target import Sizes

Masks = Mapping[str, Tensor]  # name of a matrix -> (its shape) bool, False where a weight is removed


class Pruning(Protocol):
    """Chooses what to keep."""

    def smaller(self, model: PreTrainedModel, masks: Masks, share: float) -> Masks:
        """Return masks that keep `share` of the prunable parameters: those of `model` with the greatest magnitude.

        What `masks` have removed stays removed.
        """

    def random(self, masks: Masks, draw: torch.Generator) -> Masks:
        """Return masks that keep as much of each block, drawn at random."""


def everything(anatomy: Anatomy) -> Masks:
    """Return the masks of an unpruned model."""
    return {
        f"{block.path}.{part.tensor}": torch.ones(part.shape(block.size), dtype=torch.bool)
        for block in anatomy.blocks
        for part in block.slices
    }


def share_left(masks: Masks) -> float:
    """Return the share of the prunable parameters that the masks keep."""
    return sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())


class UnitPruning:
    """Removes KV groups and MLP channels, the same number in every layer: as near to the share as possible."""

    def __init__(self, anatomy: Anatomy, allowed: Sizes) -> None:
        self._anatomy, self._allowed = anatomy, allowed

    def smaller(self, model: PreTrainedModel, masks: Masks, share: float) -> Masks:
        left = {block.name: _units(masks, block) for block in self._anatomy.blocks}
        allowed = {
            name: [size for size in sizes if size.units <= int(left[name].sum())]
            for name, sizes in self._allowed.items()
        }
        sizes = uniform(self._anatomy, 1 - share, allowed)
        layers = model.get_submodule(self._anatomy.layers_path)
        kept = {}
        for block in self._anatomy.blocks:
            scores = magnitude(layers.get_submodule(str(block.layer)), block).masked_fill(~left[block.name], -torch.inf)
            kept[block.name] = keep_highest(scores, sizes[block.name].units)
        return self._masks(kept)

    def random(self, masks: Masks, draw: torch.Generator) -> Masks:
        counts = {block.name: int(_units(masks, block).sum()) for block in self._anatomy.blocks}
        return self._masks(
            {
                block.name: torch.randperm(block.units, generator=draw)[: counts[block.name]].sort().values
                for block in self._anatomy.blocks
            }
        )

    def _masks(self, kept: Mapping[str, Tensor]) -> Masks:
        masks = {name: torch.zeros_like(mask) for name, mask in everything(self._anatomy).items()}
        for block in self._anatomy.blocks:
            for part in block.slices:
                entries = part.entries(Kept.whole(kept[block.name], block.members), block.size)
                masks[f"{block.path}.{part.tensor}"].index_fill_(part.dim, entries, True)
        return masks


class WeightPruning:
    """Removes single weights: those of least magnitude among all prunable matrices."""

    def smaller(self, model: PreTrainedModel, masks: Masks, share: float) -> Masks:
        parts = [
            torch.where(mask, model.get_parameter(name).detach().abs(), -1).flatten() for name, mask in masks.items()
        ]
        flat = torch.cat(parts)
        left = torch.zeros(len(flat), dtype=torch.bool)
        left[keep_highest(flat, round(share * len(flat)))] = True
        sizes = [mask.numel() for mask in masks.values()]
        return {name: part.view_as(mask) for (name, mask), part in zip(masks.items(), left.split(sizes), strict=True)}

    def random(self, masks: Masks, draw: torch.Generator) -> Masks:
        """Each matrix keeps as many weights as it had."""
        return {
            name: mask.flatten()[torch.randperm(mask.numel(), generator=draw)].view_as(mask)
            for name, mask in masks.items()
        }


def _units(masks: Masks, block: Block) -> Tensor:
    """Return which units of a block are kept, (units,) bool."""
    by_channel = block.reader.by_entry(masks[f"{block.path}.{block.reader.tensor}"]).flatten(1).any(1)
    return by_channel.view(block.units, -1).any(1)
