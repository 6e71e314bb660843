"""Depth pruning: which layers or single blocks to drop, and the model without them.

The value of a layer or block depends on which others are present, so summing the costs of single ones selects bad sets.
They are therefore dropped one after another: each time, the one that leaves the predictions closest to the dense
model's (by KL divergence, or by 1 - cosine of embeddings), measured again on a few calibration rows.

A round reads every layer once. For each candidate already passed, a hidden state of the model without it is carried
along. For L layers, that is L^2 / 2 layer runs on these rows and L hidden states, stored where `layers` allocates them;
for blocks, twice as many.
"""

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from numprune.blocks import Anatomy, Block
from numprune.calibration import Walker, check_rows, silenced
from numprune.configs import pruned_config
from numprune.errors import InputError
from numprune.layers import Entered, Head, Layers
from numprune.plans import DroppedBlock, DroppedLayer
from numprune.progress import Progress
from numprune.renumber import layers_left
from numprune.slices import GONE

logger = logging.getLogger(__name__)

T = TypeVar("T")
Piece = tuple[Block, ...]  # what is dropped at once: the blocks of a layer, or one of them

_ROWS = 16  # calibration rows for the choice, spread evenly over all rows
_ROUNDING = 1e-9  # of shares of parameters


class Shallower:
    """The layers of a model without some of them, renumbered (numprune.layers.Layers)."""

    def __init__(self, layers: Layers, dropped: Collection[int]) -> None:
        self._layers = layers
        self._left = layers_left(layers.anatomy.layers, dropped)
        self.anatomy = layers.anatomy.without(dropped)
        self.config = pruned_config(layers.config, self.anatomy, dropped=dropped)
        self.task, self.processes, self.resident = layers.task, layers.processes, layers.resident
        self.device, self.dtype = layers.device, layers.dtype

    def enter(self, tokens: Tensor, mask: Tensor | None = None) -> Entered:
        entered = self._layers.enter(tokens, mask)
        return Entered(entered.hidden, tuple(entered.arguments[layer] for layer in self._left))

    def layer(self, index: int) -> AbstractContextManager[nn.Module]:
        return self._layers.layer(self._left[index])

    def head(self) -> AbstractContextManager[Head]:
        return self._layers.head()

    def allocate(self, *shape: int, near: int | None = None) -> Tensor:
        return self._layers.allocate(*shape, near=None if near is None else self._left[near])


class Sparser:
    """The layers of a model without some of their blocks (numprune.layers.Layers)."""

    def __init__(self, layers: Layers, dropped: Collection[str]) -> None:
        self._layers = layers
        self._dropped = [block for block in layers.anatomy.blocks if block.name in dropped]
        self.anatomy = without_blocks(layers.anatomy, dropped)
        self.config = layers.config
        self.task, self.processes, self.resident = layers.task, layers.processes, layers.resident
        self.device, self.dtype = layers.device, layers.dtype

    def enter(self, tokens: Tensor, mask: Tensor | None = None) -> Entered:
        return self._layers.enter(tokens, mask)

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        own = [block for block in self._dropped if block.layer == index]
        with self._layers.layer(index) as layer, silenced(layer, own):
            yield layer

    def head(self) -> AbstractContextManager[Head]:
        return self._layers.head()

    def allocate(self, *shape: int, near: int | None = None) -> Tensor:
        return self._layers.allocate(*shape, near=near)


def without_blocks(anatomy: Anatomy, dropped: Collection[str]) -> Anatomy:
    """Return the anatomy in which the blocks of these names have no units."""
    return anatomy.keeping({block.name: GONE if block.name in dropped else block.size for block in anatomy.blocks})


def ratio_left(anatomy: Anatomy, ratio: float, dropped: Collection[int], blocks: Collection[str] = ()) -> float:
    """Return the share of what is left of the prunable parameters to remove so that `ratio` of all are removed.

    Args:
        dropped: layers that are dropped.
        blocks: names of single blocks that are.

    Raises:
        InputError: the dropped layers or blocks exceed `ratio`.
    """
    lost = [block for block in anatomy.blocks if block.layer in dropped or block.name in blocks]
    whole, gone = _parameters(anatomy.blocks), _parameters(lost)
    if gone > (ratio + _ROUNDING) * whole:
        what, count = ("layers", len(dropped)) if dropped else ("blocks", len(blocks))
        raise InputError(
            f"drop_{what} is {count}: these {what} have {gone / whole:.4f} of the prunable parameters, which exceeds "
            f"the ratio {ratio}; drop fewer, or choose a ratio of at least {gone / whole + 5e-5:.4f}"
        )
    return max(0.0, (ratio * whole - gone) / (whole - gone)) if gone else ratio


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
    return sorted(free, key=lambda layer: _parameters(anatomy.of_layer(layer)))[:count]


def smallest_blocks(anatomy: Anatomy, count: int, protected: Collection[str] = ()) -> list[str]:
    """Return the names of the `count` blocks with the fewest parameters: the smallest possible drop.

    Args:
        protected: names of blocks that must stay.

    Raises:
        InputError: at least one block of each kind must stay, and fewer than `count` others may be dropped.
    """
    free = sorted(_single(anatomy, protected), key=_parameters)
    kinds = {kind: sum(bool(block.units) for block in anatomy.of_kind(kind)) for kind in anatomy.kinds}
    chosen: list[str] = []
    for (block,) in free:
        if len(chosen) < count and kinds[block.kind] > 1:
            kinds[block.kind] -= 1
            chosen.append(block.name)
    if len(chosen) < count:
        raise InputError(
            f"drop_blocks is {count}; at most {len(chosen)} can be dropped: one of each kind stays, and everything "
            "that keep protects"
        )
    return chosen


def _single(anatomy: Anatomy, protected: Collection[str]) -> list[Piece]:
    return [(block,) for block in anatomy.blocks if block.units and block.name not in protected]


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
    smallest_layers(anatomy, count, protected)
    pieces = [anatomy.of_layer(layer) for layer in layers_left(anatomy.layers, protected)]
    found = _greedy(layers, rows, pieces, count, ratio, batch_size, "layers")
    return tuple(DroppedLayer(layer=piece[0].layer, divergence=divergence) for piece, divergence in found)


def choose_blocks(
    layers: Layers,
    rows: Tensor,
    count: int,
    ratio: float,
    protected: Collection[str] = (),
    batch_size: int = 8,
) -> tuple[DroppedBlock, ...]:
    """Return the single blocks to drop, like `choose`; `protected`: names of blocks that stay."""
    smallest_blocks(layers.anatomy, count, protected)
    pieces = _single(layers.anatomy, protected)
    found = _greedy(layers, rows, pieces, count, ratio, batch_size, "blocks")
    return tuple(DroppedBlock(block=piece[0].name, divergence=divergence) for piece, divergence in found)


@torch.no_grad()
def _greedy(
    layers: Layers, rows: Tensor, pieces: Sequence[Piece], count: int, ratio: float, batch_size: int, what: str
) -> list[tuple[Piece, float]]:
    """Return `count` pieces in the order in which they were chosen, with the divergence after each."""
    anatomy = layers.anatomy
    check_rows(anatomy, rows)
    rows = rows[:: max(1, len(rows) // _ROWS)][:_ROWS]
    predictions = len(rows) * layers.task.predictions_in(rows.shape[1])
    walker = Walker(layers, rows.shape[1:], batch_size)
    rows = rows[walker.share(len(rows))]
    parts = rows.split(batch_size if layers.resident else len(rows)) if len(rows) else ()
    dense: list[Tensor] = []  # output of the dense model's last layer, by part
    dropped: list[tuple[Piece, float]] = []
    with Progress(count * anatomy.layers * len(parts), "drop", "layer") as bar:
        for more in reversed(range(count)):
            gone = {block.name for piece, _ in dropped for block in piece}
            candidates = _candidates(anatomy, pieces, gone, more, ratio, what)
            divergence = dict.fromkeys(candidates, 0.0)
            for number, part in enumerate(parts):
                full, lacking = _leaving(walker, part, gone, candidates, bar)
                if not dropped:
                    dense.append(full)
                for name, total in divergences(layers, part, dense[number], lacking).items():
                    divergence[name] += total
            totals = torch.tensor([*divergence.values()], dtype=torch.float64)
            layers.processes.add_up(totals)
            divergence = dict(zip(divergence, totals.tolist(), strict=True))
            name = min(divergence, key=divergence.__getitem__)
            mean = float(f"{divergence[name] / predictions:.4g}")  # further digits depend on the machine
            dropped.append((candidates[name], mean))
            logger.info("drop %s: %.4f %s from the dense model", name, mean, layers.task.unit)
    return dropped


def _candidates(
    anatomy: Anatomy, pieces: Sequence[Piece], gone: Collection[str], more: int, ratio: float, what: str
) -> dict[str, Piece]:
    """Return the pieces that can be dropped next such that `more` others can follow within `ratio`, by name.

    Args:
        gone: names of the blocks that are dropped.
    """
    room = (ratio + _ROUNDING) * _parameters(anatomy.blocks)
    room -= _parameters(block for block in anatomy.blocks if block.name in gone)
    left = [piece for piece in pieces if not {block.name for block in piece} <= {*gone}]
    found = {}
    for piece in left:
        costs = sorted(_parameters(other) for other in left if other is not piece)
        names = {*gone, *(block.name for block in piece)}
        rest = [block.kind for block in anatomy.blocks if block.units and block.name not in names]
        if {*rest} == {*anatomy.kinds} and _parameters(piece) + sum(costs[:more]) <= room:
            found[piece[0].name if what == "blocks" else f"layer {piece[0].layer}"] = piece
    if not found:
        raise InputError(
            f"drop_{what}: after those chosen first, no {more + 1} of the others can go without more than the ratio "
            f"{ratio} being removed, or no attention or no MLP being left; drop fewer"
        )
    return found


def _leaving(
    walker: Walker, rows: Tensor, gone: Collection[str], candidates: Mapping[str, Piece], bar: Progress
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the last layer's output (n, S, H) without the blocks `gone` and one candidate, by candidate."""
    layers = walker.layers
    full = walker.embed(rows).hidden
    lacking: dict[str, Tensor] = {}
    for index in range(layers.anatomy.layers):
        bar.update()
        blocks = [block for block in layers.anatomy.of_layer(index) if block.units]
        left = [block for block in blocks if block.name not in gone]
        own = {name: piece for name, piece in candidates.items() if piece[0].layer == index}
        full = walker.merged(index, full)
        lacking = {name: walker.merged(index, hidden) for name, hidden in lacking.items()}
        if blocks and not left:
            continue
        entering = {name: layers.allocate(*full.shape).copy_(full) for name in own}
        with layers.layer(index) as layer:
            passing = [(hidden, left) for hidden in (full, *lacking.values())]
            passing += [
                (entering[name], [block for block in left if block not in piece]) for name, piece in own.items()
            ]
            for hidden, kept in passing:
                if kept:
                    with silenced(layer, [block for block in blocks if block not in kept]):
                        walker.through(layer, index, hidden, hidden)
        lacking |= entering
    return full, lacking


def divergences(layers: Layers, rows: Tensor, dense: Tensor, outputs: Mapping[T, Tensor]) -> dict[T, float]:
    """Return the summed divergence of the predictions from the dense model's, by candidate.

    Args:
        rows: (n, S).
        dense: (n, S, H), what leaves the dense model's last layer.
        outputs: the same of each candidate.
    """
    total = dict.fromkeys(outputs, 0.0)
    with layers.head() as head:
        for row in (slice(index, index + 1) for index in range(len(rows))):  # a batch's logits could be the largest
            expected = head(rows[row], dense[row].to(layers.device))
            for name, hidden in outputs.items():
                output = head(rows[row], hidden[row].to(layers.device))
                total[name] += float(layers.task.divergence(output, expected, rows[row].to(output.device)).sum())
    return total


def _parameters(blocks: Iterable[Block]) -> int:
    """The prunable parameters of some blocks."""
    return sum(block.parameters(block.size) for block in blocks)
