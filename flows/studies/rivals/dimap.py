"""DIMAP's ranking as published (He and Zhou, ICLR 2024, arXiv 2404.13648), of single weights and of units.

The matrices of all blocks form three modules: queries, keys and values, the projections after them, and the matrices of
MLPs. A weight's importance is relative to its own matrix (criteria/dimap.py). A module's weights are ranked together,
across the network, and its lowest are masked. Here each module loses the same share, as the paper does not say how it
divides a ratio. The paper trains for 30 epochs afterwards; nothing is trained here.

`dimap-weights` masks single weights, so the matrices keep their sizes. `dimap-units` removes the heads, of all layers,
whose weights have the lowest mean importance, and likewise channels of MLPs.
"""

from collections import defaultdict
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from numprune.allocation import check_ratio, global_sort, keep_highest
from numprune.anatomy import read_anatomy
from numprune.axes import Limits
from numprune.blocks import Anatomy
from numprune.budget import budget_of
from numprune.configs import pruned_config
from numprune.criteria.dimap import importances, matrices_of, weight_importances
from numprune.errors import InputError
from numprune.flows.studies.rivals.result import Result
from numprune.layers import ModelLayers
from numprune.slices import Kept, Size
from numprune.surgery import assemble, cut_layer
from numprune.target import Target, allowed_sizes


@torch.no_grad()
def dimap_weights(model: PreTrainedModel, _rows: Tensor, ratio: float, _batch_size: int) -> Result:
    """Mask the share `ratio` of each module's weights, rounded down. No data are used.

    Args:
        model: used up.
        ratio: at least 0, below 1.

    Raises:
        InputError: the model has experts or skips blocks.
    """
    anatomy = read_anatomy(model.config)
    check_modules("dimap-weights", anatomy)
    layers = ModelLayers(model)
    modules: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)  # (weight, its entries' importances)
    for index in range(anatomy.layers):
        with layers.layer(index) as layer:
            for block in anatomy.of_layer(index):
                projection = [block.reader.tensor] if block.kind == "attention" else []
                for names in matrices_of(block):
                    module = "projection" if names == projection else block.kind
                    weights = [layer.get_parameter(name) for name in names]
                    modules[module] += zip(weights, weight_importances(weights), strict=True)
    masked = sum(_mask_lowest(weights, ratio) for weights in modules.values())
    budget = budget_of(anatomy)
    return Result(model, budget.parameters, masked / budget.prunable_parameters)


def _mask_lowest(module: list[tuple[Tensor, Tensor]], ratio: float) -> int:
    """Set the share `ratio` of the weights of a module to zero, the least important ones; return how many."""
    ranked = torch.cat([importance.flatten() for _, importance in module])
    count = int(ratio * len(ranked))
    lowest = torch.zeros(len(ranked), dtype=torch.bool, device=ranked.device)
    lowest[ranked.argsort(stable=True)[:count]] = True
    sizes = [weight.numel() for weight, _ in module]
    for (weight, _), mask in zip(module, lowest.split(sizes), strict=True):
        weight[mask.view_as(weight)] = 0
    return count


@torch.no_grad()
def dimap_units(model: PreTrainedModel, _rows: Tensor, ratio: float, _batch_size: int) -> Result:
    """Remove heads and channels until both attention and MLPs have lost the share `ratio`. No data are used.

    Args:
        model: used up.
        ratio: of the prunable parameters of attention, and of MLPs; reached to within half a unit.

    Raises:
        InputError: as `check_units`.
    """
    anatomy = read_anatomy(model.config)
    check_units(anatomy, ratio)
    layers = ModelLayers(model)
    scores: dict[str, Tensor] = {}
    for index in range(anatomy.layers):
        with layers.layer(index) as layer:
            for block in anatomy.of_layer(index):
                scores[block.name] = importances(layer, block).sum(1) / block.parameters_per_unit
    sizes = sizes_by_module(anatomy, ratio, scores)
    kept = {
        block.name: Kept.whole(keep_highest(scores[block.name], sizes[block.name].units), block.members)
        for block in anatomy.blocks
    }
    cut: dict[str, Tensor] = {}
    for index in range(anatomy.layers):
        with layers.layer(index) as layer:
            cut |= cut_layer(layer, anatomy.of_layer(index), kept, {})
    left = anatomy.keeping(sizes)
    after = budget_of(left)
    removed = 1 - after.prunable_parameters / budget_of(anatomy).prunable_parameters
    return Result(assemble(model, pruned_config(model.config, left), cut), after.parameters, removed)


def sizes_by_module(anatomy: Anatomy, ratio: float, scores: dict[str, Tensor]) -> dict[str, Size]:
    """Return the size of every block: heads are ranked among all heads, and channels among all channels.

    Args:
        scores: block name -> (units,), the lowest go.
    """
    allowed = allowed_sizes(anatomy, Target(), Limits())
    sizes: dict[str, Size] = {}
    for module in _modules(anatomy):
        sizes |= global_sort(module, ratio, allowed, scores)
    return sizes


def check_modules(name: str, anatomy: Anatomy) -> None:
    """Refuse a model that the rival `name` cannot rank. Raises InputError."""
    if "experts" in anatomy.kinds:
        raise InputError(f"{name}: models with experts are not supported")
    if not all(block.units for block in anatomy.blocks):
        raise InputError(f"{name}: a model that skips blocks is not supported")


def check_units(anatomy: Anatomy, ratio: float) -> None:
    """Refuse a model whose units cannot be removed one by one, or not to this ratio. Raises InputError."""
    check_modules("dimap-units", anatomy)
    if not all(block.separable for block in anatomy.blocks):
        raise InputError(f"dimap-units: {anatomy.family} has norms over all heads, so no head can be removed")
    allowed = allowed_sizes(anatomy, Target(), Limits())
    for module in _modules(anatomy):
        check_ratio(module, ratio, allowed, counted=f"{module.blocks[0].kind} parameters")


def _modules(anatomy: Anatomy) -> list[Anatomy]:
    """Return the attention of all layers, and their MLPs."""
    return [replace(anatomy, blocks=anatomy.of_kind(kind)) for kind in anatomy.kinds]
