"""Depth pruning: which whole layers to drop, and the model without them.

The value of a layer depends on which others are present, so summing the costs of single layers selects bad sets. Layers
are therefore dropped one after another: each time, the one that leaves the predictions closest to the dense model's (by
KL divergence, or by 1 - cosine of embeddings), measured again on a few calibration rows.

A round reads every layer once. For each candidate already passed, a hidden state of the model without it is carried
along. For L layers, that is L^2 / 2 layer runs on these rows and L hidden states, stored where `layers` allocates them.
"""

import logging
from collections.abc import Collection
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from numprune.blocks import Anatomy
from numprune.calibration import Walker, check_rows
from numprune.configs import pruned_config
from numprune.errors import InputError
from numprune.layers import Entered, Head, Layers
from numprune.plans import DroppedLayer
from numprune.progress import Progress
from numprune.renumber import layers_left

logger = logging.getLogger(__name__)

_ROWS = 16  # calibration rows for the choice, spread evenly over all rows
_ROUNDING = 1e-9  # of shares of parameters


class Shallower:
    """The layers of a model without some of them, renumbered (numprune.layers.Layers)."""

    def __init__(self, layers: Layers, dropped: Collection[int]) -> None:
        self._layers = layers
        self._left = layers_left(layers.anatomy.layers, dropped)
        self.anatomy = layers.anatomy.without(dropped)
        self.config = pruned_config(layers.config, self.anatomy, dropped=dropped)
        self.task, self.resident = layers.task, layers.resident
        self.device, self.dtype = layers.device, layers.dtype

    def enter(self, tokens: Tensor, mask: Tensor | None = None) -> Entered:
        entered = self._layers.enter(tokens, mask)
        return Entered(entered.hidden, tuple(entered.arguments[layer] for layer in self._left))

    def layer(self, index: int) -> AbstractContextManager[nn.Module]:
        return self._layers.layer(self._left[index])

    def head(self) -> AbstractContextManager[Head]:
        return self._layers.head()

    def allocate(self, *shape: int) -> Tensor:
        return self._layers.allocate(*shape)


def ratio_left(anatomy: Anatomy, ratio: float, dropped: Collection[int]) -> float:
    """Return the share of the other layers' prunable parameters to remove so that `ratio` of all are removed.

    Raises:
        InputError: the dropped layers exceed `ratio`.
    """
    parameters = _by_layer(anatomy)
    whole, gone = sum(parameters), sum(parameters[layer] for layer in dropped)
    if gone > (ratio + _ROUNDING) * whole:
        raise InputError(
            f"drop_layers is {len(dropped)}: these layers have {gone / whole:.4f} of the prunable parameters, "
            f"which exceeds the ratio {ratio}; drop fewer, or choose a ratio of at least {gone / whole + 5e-5:.4f}"
        )
    return max(0.0, (ratio * whole - gone) / (whole - gone)) if dropped else ratio


def smallest_layers(anatomy: Anatomy, count: int, protected: Collection[int] = ()) -> list[int]:
    """Return the `count` layers with the fewest prunable parameters: the smallest possible drop.

    Args:
        protected: layers that must stay.

    Raises:
        InputError: no layer would be left, fewer than `count` may be dropped, or layers cannot be renumbered.
    """
    if not 0 <= count < anatomy.layers:
        raise InputError(f"drop_layers is {count}; the model has {anatomy.layers} layers, and at least one must stay")
    if count and anatomy.numbering_field:
        raise InputError(
            f"drop_layers: with {anatomy.numbering_field} each layer uses its index, so none can be dropped"
        )
    free = layers_left(anatomy.layers, protected)
    if count > len(free):
        raise InputError(f"drop_layers is {count}; keep protects blocks of all layers except {len(free)}")
    return sorted(free, key=_by_layer(anatomy).__getitem__)[:count]


@torch.no_grad()
def choose(
    layers: Layers,
    rows: Tensor,
    count: int,
    ratio: float,
    protected: Collection[int] = (),
    batch_size: int = 8,
) -> tuple[DroppedLayer, ...]:
    """Return the layers to drop, in the order in which they were chosen.

    Args:
        layers: of the dense model.
        rows: (N, S) int64 calibration tokens.
        count: how many to drop.
        ratio: largest share of the prunable parameters that they may have together.
        protected: layers that stay.
        batch_size: rows at a time.

    Raises:
        InputError: no choice of this many layers stays within that share and leaves attention and MLPs in the model.
    """
    anatomy = layers.anatomy
    check_rows(anatomy, rows)
    smallest_layers(anatomy, count, protected)
    rows = rows[:: max(1, len(rows) // _ROWS)][:_ROWS]
    predictions = len(rows) * layers.task.predictions_in(rows.shape[1])
    walker = Walker(layers, rows.shape[1:], batch_size)
    parts = rows.split(batch_size if layers.resident else len(rows))
    dense: list[Tensor] = []  # output of the dense model's last layer, by part
    dropped: list[DroppedLayer] = []
    with Progress(count * anatomy.layers * len(parts), "drop", "layer") as bar:
        for more in reversed(range(count)):
            gone = [drop.layer for drop in dropped]
            divergence = dict.fromkeys(_candidates(anatomy, gone, more, ratio, protected), 0.0)
            for number, part in enumerate(parts):
                full, lacking = _leaving(walker, part, gone, divergence, bar)
                if not dropped:
                    dense.append(full)
                for layer, total in _divergences(layers, part, dense[number], lacking).items():
                    divergence[layer] += total
            layer = min(divergence, key=lambda layer: (divergence[layer], layer))
            mean = float(f"{divergence[layer] / predictions:.4g}")  # further digits depend on the machine
            dropped.append(DroppedLayer(layer=layer, divergence=mean))
            logger.info("drop layer %d: %.4f %s from the dense model", layer, mean, layers.task.unit)
    return tuple(dropped)


def _candidates(anatomy: Anatomy, gone: list[int], more: int, ratio: float, protected: Collection[int]) -> list[int]:
    """Return the layers that can be dropped next such that `more` others can follow within `ratio`."""
    parameters = _by_layer(anatomy)
    room = (ratio + _ROUNDING) * sum(parameters) - sum(parameters[layer] for layer in gone)
    left = sorted(layers_left(anatomy.layers, {*gone, *protected}), key=parameters.__getitem__)
    found = []
    for layer in sorted(left):
        least = sum([parameters[other] for other in left if other != layer][:more])
        rest = anatomy.without([*gone, layer])
        complete = all(any(block.units for block in rest.of_kind(kind)) for kind in anatomy.kinds)
        if complete and parameters[layer] + least <= room:
            found.append(layer)
    if not found:
        raise InputError(
            f"drop_layers: after layers {gone} no other {more + 1} can go without more than the ratio {ratio} being "
            "removed, or no attention or no MLP being left; drop fewer"
        )
    return found


def _leaving(
    walker: Walker, rows: Tensor, gone: Collection[int], candidates: Collection[int], bar: Progress
) -> tuple[Tensor, dict[int, Tensor]]:
    """Return the last layer's output (n, S, H) without the layers `gone` and one candidate, by candidate."""
    layers = walker.layers
    full = walker.embed(rows).hidden
    lacking: dict[int, Tensor] = {}
    for index in range(layers.anatomy.layers):
        bar.update()
        if index in gone:
            continue
        entering = layers.allocate(*full.shape).copy_(full) if index in candidates else None
        with layers.layer(index) as layer:
            for hidden in (full, *lacking.values()):
                walker.through(layer, index, hidden, hidden)
        if entering is not None:
            lacking[index] = entering
    return full, lacking


def _divergences(layers: Layers, rows: Tensor, dense: Tensor, lacking: dict[int, Tensor]) -> dict[int, float]:
    """Return the summed divergence of the predictions from the dense model's, by candidate."""
    total = dict.fromkeys(lacking, 0.0)
    with layers.head() as head:
        for row in (slice(index, index + 1) for index in range(len(rows))):  # a batch's logits could be the largest
            expected = head(rows[row], dense[row].to(layers.device))
            for layer, hidden in lacking.items():
                output = head(rows[row], hidden[row].to(layers.device))
                total[layer] += float(layers.task.divergence(output, expected, rows[row].to(output.device)).sum())
    return total


def _by_layer(anatomy: Anatomy) -> list[int]:
    """The prunable parameters of each layer."""
    return [sum(block.parameters(block.size) for block in anatomy.of_layer(layer)) for layer in range(anatomy.layers)]
