"""Wanda's score on whole structures, as FLAP's authors run it (An et al., AAAI 2024, arXiv 2312.11983: "Wanda-sp").

The score of weight (i, j) is |W_ij| ||x_j||_2 (Wanda; Sun et al. 2023, arXiv 2306.11695, eq. 1). In the authors'
program, `prune_wanda_sp` of CASIA-IVA-Lab/FLAP, a channel's score is the mean over the rows i of the consumer's weight,
and a head's the sum over its channels. Layers are pruned first to last: attention and MLP of a layer are scored in one
pass of the dense layer over the output of the pruned layers before it. Every block loses the same share of its units,
rounded down. Nothing is refitted.

It differs from `wanda / uniform / none` in the norm over i (L1 in place of L2), in the prefix (pruned in place of
dense) and in the split (the ratio of each block in place of the best split).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from numprune.anatomy import read_anatomy
from numprune.blocks import Anatomy, Block
from numprune.budget import budget_of
from numprune.calibration import Walker, check_rows, consumer_of, consumer_weight
from numprune.configs import pruned_config
from numprune.errors import InputError
from numprune.flows.studies.rivals.result import Result
from numprune.layers import ModelLayers
from numprune.slices import Kept
from numprune.surgery import assemble, channels_of, cut_layer


@torch.no_grad()
def wanda_sp(model: PreTrainedModel, rows: Tensor, ratio: float, batch_size: int) -> Result:
    """Remove the share `ratio` of every block's units, rounded down. A unit of grouped-query attention is a KV group.

    Args:
        model: used up.
        rows: (N, S) int64 calibration tokens.
        ratio: at least 0, below 1.
        batch_size: rows at a time.

    Raises:
        InputError: the model has experts or norms over all heads, or the rows are not this model's.
    """
    anatomy = read_anatomy(model.config)
    check_units(anatomy)
    check_rows(anatomy, rows)
    layers = ModelLayers(model)
    walker = Walker(layers, rows.shape[1:], batch_size)
    hidden = walker.embed(rows).hidden
    scratch = torch.empty_like(hidden)
    kept: dict[str, Kept] = {}
    cut: dict[str, Tensor] = {}
    for index in range(anatomy.layers):
        blocks = [block for block in anatomy.of_layer(index) if block.units]
        with layers.layer(index) as layer:
            energy = _Energy(layer, blocks)
            walker.through(layer, index, hidden, scratch)
            energy.remove_hooks()
            for block in blocks:
                weight = consumer_weight(layer, block)
                scores = unit_scores(weight, energy.of[block.name], block.units)
                kept[block.name] = Kept.whole(highest(scores, ratio), block.members)
                removed = torch.ones(block.channels, dtype=torch.bool, device=weight.device)
                removed[channels_of(block, kept[block.name])] = False
                weight[:, removed] = 0
            walker.through(layer, index, hidden, hidden)
            cut |= cut_layer(layer, anatomy.of_layer(index), kept, {})
    left = anatomy.keeping({block.name: kept[block.name].size for block in anatomy.blocks})
    after = budget_of(left)
    removed_ratio = 1 - after.prunable_parameters / budget_of(anatomy).prunable_parameters
    return Result(assemble(model, pruned_config(model.config, left), cut), after.parameters, removed_ratio)


def check_units(anatomy: Anatomy) -> None:
    """Refuse a model whose units cannot be removed one by one. Raises InputError."""
    if "experts" in anatomy.kinds:
        raise InputError("wanda-sp: models with experts are not supported")
    if not all(block.separable for block in anatomy.blocks):
        raise InputError(f"wanda-sp: {anatomy.family} has norms over all heads, so no head can be removed")
    if not all(block.units for block in anatomy.blocks):
        raise InputError("wanda-sp: a model that skips blocks is not supported")


def unit_scores(weight: Tensor, energy: Tensor, units: int) -> Tensor:
    """Return the sum over a unit's channels of mean_i |W_ij| ||x_j||_2, (units,) float64.

    Args:
        weight: (out, D), the consumer's.
        energy: (D,) sum over tokens of x_j^2.
        units: how many the D channels form, in order.
    """
    return (weight.double().abs().mean(0) * energy.sqrt()).view(units, -1).sum(1)


def highest(scores: Tensor, ratio: float) -> Tensor:
    """Return the units (K,) that stay, ascending: all but the `int(ratio * units)` of the lowest scores."""
    return scores.argsort(stable=True)[int(ratio * len(scores)) :].sort().values


class _Energy:
    """Sums the squares of what consumers read while a layer runs.

    Attributes:
        of: block name -> (D,) float64.
    """

    def __init__(self, layer: nn.Module, blocks: Sequence[Block]) -> None:
        self.of: dict[str, Tensor] = {}
        self._handles = [
            consumer_of(layer, block).register_forward_pre_hook(
                lambda _, args, name=block.name: self._add(name, args[0])
            )
            for block in blocks
        ]

    def _add(self, name: str, inputs: Tensor) -> None:
        squares = inputs.double().square().flatten(0, -2).sum(0)
        self.of[name] = self.of[name] + squares if name in self.of else squares

    def remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
