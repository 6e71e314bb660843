"""Choose hidden size, dropped layers and the sizes of blocks within one ratio or budget.

For each candidate of hidden size and dropped layers, the allocation chooses the sizes of blocks, with costs at that
hidden size. Three losses are added up for its price: that of the blocks' error curves, which a rotation of the residual
stream does not change; the divergence without the dropped layers, and that of the model with all units at that hidden
size, both as measured. (1/2 sum tr(F E) over the points where the stream is read, basis.py, ranks directions well, but
ignores the refit; the price of one candidate was 2.5 times its measured loss.) Losses need not add up, so prices only
rank. The best ones, and the model's own shape, are pruned on most of the calibration rows, and compared on the others.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from numprune import basis, sensitivity
from numprune.allocation import by_error, uniform
from numprune.blocks import Anatomy
from numprune.budgeted import by_budgets, sizes_within
from numprune.calibration import Walker, check_rows
from numprune.choosing import dense_inputs, error_curves, least_units
from numprune.curves import Errors, error_at
from numprune.depth import choose
from numprune.errors import InputError
from numprune.layers import CopiedLayers
from numprune.option_checks import check_options
from numprune.options import PruneOptions, left_of, protected_layers, sizes_allowed, with_shape
from numprune.plans import DroppedLayer
from numprune.pruning import config_after, prune_layers
from numprune.quantization.allocation import Rounding, levels_of
from numprune.quantization.pricing import rounding_prices
from numprune.shape import PLAIN, Shape, ShapeChoice, TriedShape
from numprune.surgery import assemble
from numprune.tasks import CAUSAL, Task
from numprune.time_budget import TimeBudget

logger = logging.getLogger(__name__)

_MEASURED = 3  # candidates, in addition to the model's own shape
_APART = 4  # every fourth row measures
_UNLIMITED_MS = 1e9
MINIMUM_ROWS = 2 * _APART


def check_comparable(rows: int, *, resident: bool) -> None:
    """Refuse what candidates cannot be compared on. Raises InputError.

    Args:
        rows: of calibration.
        resident: the model is in memory.
    """
    if rows < MINIMUM_ROWS:
        raise InputError(
            f"hidden_size, drop_layers: every fourth calibration row compares candidates; {rows} rows are too few, use "
            f"at least {MINIMUM_ROWS}"
        )
    if not resident:
        raise InputError(
            "hidden_size, drop_layers: candidates are pruned and compared in memory, which streaming avoids; give one "
            "hidden size and one number of layers, or do not stream"
        )


def choose_shape(
    model: PreTrainedModel, rows: Tensor, options: PruneOptions, task: Task = CAUSAL
) -> tuple[PruneOptions, ShapeChoice]:
    """Return the options with one of `options.shapes`, and how it was chosen.

    Args:
        model: as for `prune`; not modified.
        rows: (N, S) int64 calibration tokens.

    Raises:
        InputError: as `check_options`, the rows do not fit the model, or no shape is within the ratio or the budget.
    """
    layers = CopiedLayers(model, task)
    check_options(layers.anatomy, options)
    check_rows(layers.anatomy, rows)
    check_comparable(len(rows), resident=True)
    apart = torch.arange(len(rows)) % _APART == 0
    study = _Study.of(model, layers, rows[~apart], rows[apart], options)
    priced = sorted(study.priced(), key=lambda found: found[1])
    measured = {shape for shape, _ in priced[:_MEASURED]} | {PLAIN}
    found = {shape: study.divergence(with_shape(options, shape)) for shape, _ in priced if shape in measured}
    best = min(found, key=found.__getitem__)
    tried = {
        shape: TriedShape(
            hidden_size=shape.hidden_size or layers.anatomy.hidden_size,
            drop_layers=shape.drop_layers,
            predicted=_rounded(price),
            measured=_rounded(found[shape]) if shape in found else None,
        )
        for shape, price in priced
    }
    ordered = [tried.pop(best), *tried.values()]
    choice = ShapeChoice(tried=ordered, rows_apart=int(apart.sum()), unit=task.unit)
    for line in choice.lines():
        logger.info("%s", line)
    return with_shape(options, best), choice


@dataclass(frozen=True)
class _Study:
    """One model with what was measured of it on the rows to prune on; `apart`: the rows to compare on.

    Attributes:
        widths: divergence at each smaller hidden size with all units.
    """

    model: PreTrainedModel
    layers: CopiedLayers
    rows: Tensor
    apart: Tensor
    options: PruneOptions
    dropped: Sequence[DroppedLayer]
    moments: basis.StreamMoments | None
    errors: Errors
    rounding: Rounding
    widths: dict[int, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls, model: PreTrainedModel, layers: CopiedLayers, rows: Tensor, apart: Tensor, options: PruneOptions
    ) -> "_Study":
        anatomy, batch_size = layers.anatomy, options.batch_size
        most = max(shape.drop_layers for shape in options.shapes)
        protected = protected_layers(anatomy, options)
        dropped = choose(layers, rows, most, 1.0, protected, batch_size) if most else ()
        narrows = any(shape.hidden_size for shape in options.shapes)
        moments = basis.measure(layers, rows, batch_size, seed=options.seed) if narrows else None
        gradients = sensitivity.measure(layers, rows, batch_size)
        walker = Walker(layers, rows.shape[1:], batch_size)
        fewest = least_units(sizes_allowed(anatomy, options))
        errors = error_curves(layers, dense_inputs(walker, rows, None), options, gradients, fewest)
        levels = levels_of(options.budget, options.target) if options.budget else ()
        schemes = [level for level in levels if level is not None]
        rounding = rounding_prices(walker, rows, gradients.output, schemes) if schemes else {}
        return cls(model, layers, rows, apart, options, dropped, moments, errors, rounding)

    def priced(self) -> Iterator[tuple[Shape, float]]:
        """Yield every shape within the ratio or the budget, with its price. Raises InputError if no shape is."""
        refusals = []
        for shape in self.options.shapes:
            try:
                yield shape, self._price(shape)
            except InputError as error:
                logger.info("hidden size %s, drop_layers %d: %s", shape.hidden_size or "kept", shape.drop_layers, error)
                refusals.append(error)
        if len(refusals) == len(self.options.shapes):
            raise refusals[0]

    def _price(self, shape: Shape) -> float:
        options, gone = with_shape(self.options, shape), [drop.layer for drop in self.dropped[: shape.drop_layers]]
        anatomy, left = left_of(self.layers.anatomy, options, gone)
        whole = self.layers.anatomy
        total = self._units(anatomy, left, _renamed(self.errors, whole, gone), _renamed(self.rounding, whole, gone))
        if gone:
            total += self.dropped[shape.drop_layers - 1].divergence
        if shape.hidden_size is not None:
            total += self._width(shape.hidden_size)
        return total

    def _width(self, size: int) -> float:
        """Return the divergence at a smaller hidden size, if no unit and no layer goes."""
        if size not in self.widths:
            whole = replace(self.options, ratio=0.0, budget=None, time_budget=self._unlimited(), kv_budget=None)
            self.widths[size] = self.divergence(with_shape(whole, Shape(size, 0)))
        return self.widths[size]

    def _unlimited(self) -> TimeBudget | None:
        """Return the budget of time without a limit, which still lets a rotation add an output matrix."""
        budget = self.options.time_budget
        return budget and replace(budget, limit_ms=_UNLIMITED_MS)

    def _units(self, anatomy: Anatomy, options: PruneOptions, errors: Errors, rounding: Rounding) -> float:
        """Return the price of the sizes, and the schemes, that the allocation chooses."""
        allowed = sizes_within(anatomy, options.budgets, sizes_allowed(anatomy, options))
        if options.budgets:
            return by_budgets(anatomy, options.budgets, options.target, allowed, errors, rounding).price
        divide = by_error if options.allocation == "error" else uniform
        sizes = divide(anatomy, options.ratio, allowed, errors)
        return math.fsum(error_at(errors, block, sizes[block.name]) for block in anatomy.blocks)

    @torch.no_grad()
    def divergence(self, options: PruneOptions) -> float:
        """Return the mean divergence from the dense model, on the rows apart, of the model pruned with these options.

        `options`: those of the study with one shape.
        """
        narrowing, cut = None, dict[str, Tensor]()
        if options.hidden_size is not None:
            assert self.moments is not None
            narrowing = basis.choose(self.moments, options.hidden_size, options.basis)
        gone = self.dropped[: options.drop_layers]
        made = prune_layers(self.layers, self.rows, options, cut.update, dropped=gone, narrowing=narrowing)
        pruned = assemble(self.model, config_after(self.layers, made), cut, narrowing)
        return divergence(CopiedLayers(pruned, self.layers.task), self.layers, self.apart)


@torch.no_grad()
def divergence(pruned: CopiedLayers, dense: CopiedLayers, rows: Tensor) -> float:
    """Return the mean divergence of a model's predictions from the dense model's on some rows, in the task's unit."""
    task, total, count = dense.task, 0.0, 0
    walkers = [Walker(layers, rows.shape[1:], 1) for layers in (pruned, dense)]
    for row in rows.split(1):  # a batch's logits could be the largest tensor
        leaving = [walker.embed(row).hidden for walker in walkers]
        for walker, hidden in zip(walkers, leaving, strict=True):
            for index in range(walker.layers.anatomy.layers):
                with walker.layers.layer(index) as layer:
                    walker.through(layer, index, hidden, hidden)
        with pruned.head() as head, dense.head() as dense_head:
            output, expected = head(row, leaving[0].to(pruned.device)), dense_head(row, leaving[1].to(dense.device))
        found = task.divergence(output, expected, row.to(output.device))
        total, count = total + float(found.sum()), count + found.numel()
    return total / count


T = TypeVar("T")


def _renamed(table: Mapping[str, T], anatomy: Anatomy, gone: Sequence[int]) -> dict[str, T]:
    """Return the values of the blocks that remain, by their names without the layers `gone`."""
    if not table:
        return {}
    before = [block.name for block in anatomy.blocks if block.layer not in gone]
    after = [block.name for block in anatomy.without(gone).blocks]
    return {new: table[old] for old, new in zip(before, after, strict=True)}


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")  # further digits depend on the batch size and the machine
