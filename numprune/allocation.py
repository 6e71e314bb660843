"""How many units each block keeps. A ratio always means: of the prunable parameters.

Every allocation leaves at least one unit in a block, and intermediate sizes that are multiples of `align` (unless the
model's own is not). What was reached is what the plan counts, not what was asked for.
"""

from collections.abc import Callable, Mapping
from itertools import pairwise

import torch
from torch import Tensor

from numprune.anatomy import Anatomy, Block
from numprune.budget import measure
from numprune.errors import InputError

Scores = Mapping[str, Tensor]  # block name -> (units,), higher is kept sooner


def check_ratio(anatomy: Anatomy, ratio: float, align: int) -> None:
    """Refuse a ratio that no allocation can reach.

    Raises:
        InputError: ratio outside [0, 1), align under 1, or more than can go with the floor of one unit a block.
    """
    if not 0 <= ratio < 1:
        raise InputError(f"ratio is {ratio}; it must be at least 0 and under 1")
    if align < 1:
        raise InputError(f"align is {align}; it must be at least 1")
    smallest = {block.name: _floor(block, align) for block in anatomy.blocks}
    reachable = 1 - measure(anatomy.keeping(smallest)).prunable_parameters / measure(anatomy).prunable_parameters
    if ratio > reachable:
        raise InputError(
            f"ratio is {ratio}, but with at least one unit in every block and align={align} at most {reachable:.3f} "
            f"of the prunable parameters can be removed"
        )


def uniform(anatomy: Anatomy, ratio: float, align: int) -> dict[str, int]:
    """Return units kept per block: the same number in every layer, so that a stock architecture holds the result.

    KV groups are coarse, so attention takes the nearest whole number of groups and the MLP makes up the difference.

    Raises:
        InputError: the layers already differ, or the ratio cannot be reached.
    """
    check_ratio(anatomy, ratio, align)
    if not anatomy.is_uniform:
        raise InputError(
            "the model's layers differ already; uniform allocation needs equal ones (use --allocation global)"
        )
    attention, mlp = anatomy.of_kind("attention"), anatomy.of_kind("mlp")
    target = (1 - ratio) * measure(anatomy).prunable_parameters
    groups, width = attention[0].units, mlp[0].units
    floor = _floor(mlp[0], align)
    for kept_groups in sorted(range(1, groups + 1), key=lambda kept: (abs(kept - (1 - ratio) * groups), -kept)):
        remaining = target - kept_groups * sum(block.parameters_per_unit for block in attention)
        exact = remaining / sum(block.parameters_per_unit for block in mlp)
        if exact > width + align / 2 or exact < floor - align / 2:
            continue  # this many groups leave the MLP more than it has, or less than its floor
        kept_width = width if exact > width - align / 2 else min(max(round(exact / align) * align, floor), width)
        return {block.name: kept_groups if block.kind == "attention" else kept_width for block in anatomy.blocks}
    raise InputError(f"no uniform allocation removes {ratio} of the prunable parameters with align={align}")


def global_sort(anatomy: Anatomy, ratio: float, align: int, scores: Scores) -> dict[str, int]:
    """Return units kept per block: all units sorted together, the lowest removed until the parameter *cost* is reached.

    With `align`, a block loses its lowest units in steps that keep its size a multiple; a step's score is their mean.
    """
    check_ratio(anatomy, ratio, align)
    steps: list[tuple[float, int, Block]] = []  # (score, units removed, block), ascending within each block
    for block in anatomy.blocks:
        ascending = scores[block.name].sort().values
        size = _step(block, align)
        first = block.units % size or size
        removable = block.units - _floor(block, align)
        bounds = [0, *range(first, removable + 1, size)]
        for start, stop in pairwise(bounds):
            steps.append((float(ascending[start:stop].mean()), stop - start, block))
    # A stable sort by the score alone keeps each block's own order where scores tie.
    steps.sort(key=lambda step: step[0])
    kept = {block.name: block.units for block in anatomy.blocks}
    to_remove = ratio * measure(anatomy).prunable_parameters
    for _, units, block in steps:
        cost = units * block.parameters_per_unit
        if to_remove < cost / 2:  # nearest: a step that overshoots by more than it falls short is not taken
            break
        kept[block.name] -= units
        to_remove -= cost
    return kept


def keep_highest(scores: Tensor, count: int) -> Tensor:
    """Return the indices of the `count` highest of (units,) scores, ascending. Ties go to the lower index."""
    order = torch.sort(scores, descending=True, stable=True).indices
    return order[:count].sort().values


def _step(block: Block, align: int) -> int:
    return align if block.kind == "mlp" else 1


def _floor(block: Block, align: int) -> int:
    return min(_step(block, align), block.units)


ALLOCATIONS: dict[str, Callable[..., dict[str, int]]] = {"uniform": uniform, "global": global_sort}
