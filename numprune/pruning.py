"""The pruning pass: calibrate, score, allocate, choose, compensate, cut.

There is one pass over the model, from the first layer to the last (and one before it if the allocation needs every
block's scores or error curve). For each block, it collects moments of the consumer's inputs, scores and chooses units,
and refits the consumer. With `sequential` and `residual` compensation, the inputs come from the already pruned prefix
and the targets from the dense model, both carried side by side. Each layer is handed on as soon as it is finished, so
neither the model nor the result has to fit in memory.

Whole layers or blocks to drop are chosen first (depth.py). Scores, error curves and inputs are then those of the model
without them; targets from the dense model still include them.

If the hidden size is cut, the coordinates of the residual stream to keep are chosen next (basis.py). With a rotation,
everything else is done on the rotated model. The other coordinates are zero in the pruned prefix (hidden.py). If inputs
come from the pruned prefix, the matrices that read the stream are refitted, too (readers.py), the output matrix last.
Consumers are fitted to the kept coordinates. The tensors are cut at the end.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from numprune import basis
from numprune.anatomy import read_anatomy
from numprune.blocks import Anatomy
from numprune.budget import Budget, budget_of
from numprune.calibration import Walker, check_rows, consumer_of, consumer_weight
from numprune.choosing import (
    Chosen,
    Known,
    blocks_of,
    chooser,
    dense_inputs,
    dense_reading,
    everything,
    nothing,
    planned,
    whole,
)
from numprune.configs import pruned_config
from numprune.corpus import rows_digest
from numprune.depth import Shallower, Sparser, choose, choose_blocks
from numprune.experts.finish import finish_experts
from numprune.fitting import compensate, consumer_damping, is_fitted, warn_of_few
from numprune.hidden import Basis, Narrowing, removed, silence
from numprune.inputs import FROM_PRUNED_PREFIX, Inputs, PrecomputedInputs, PropagatedInputs
from numprune.layers import CopiedLayers, Layers
from numprune.moments import Moments
from numprune.option_checks import check_options
from numprune.options import REFITTING, PruneOptions, around_left, left_of, protected_layers, without_windows
from numprune.plans import BlockPlan, Calibration, DroppedBlock, DroppedLayer, HiddenPlan, Plan, PricedSplit
from numprune.processes import ALONE, Processes, check_shareable
from numprune.progress import progress
from numprune.rotation import RotatedLayers
from numprune.scores import is_reduced
from numprune.search.refine import check_searchable
from numprune.slices import Kept
from numprune.surgery import assemble, cut_layer
from numprune.tasks import CAUSAL, Task
from numprune.windowing import Windowed, windowed

Sink = Callable[[Mapping[str, Tensor]], object]  # takes the remaining tensors of a finished layer, by full name


@dataclass(frozen=True)
class Pruned:
    model: PreTrainedModel
    plan: Plan
    before: Budget
    after: Budget

    @property
    def prunable_ratio_removed(self) -> float:
        return 1 - self.after.prunable_parameters / self.before.prunable_parameters


def prune(
    model: PreTrainedModel,
    rows: Tensor,
    options: PruneOptions,
    known: Known | None = None,
    task: Task = CAUSAL,
    plan: Plan | None = None,
    processes: Processes = ALONE,
) -> Pruned:
    """Return a pruned copy of `model`, which is not modified and shares uncut tensors with the result.

    Args:
        model: a supported model in float32, with the attention implementation of its family.
        rows: (N, S) int64 calibration tokens.
        options: what to remove and how.
        known: data already collected from the model on these rows.
        task: of the model.
        plan: as for `prune_layers`.
        processes: that share the rows; all of them get the same result.

    Raises:
        InputError: unsupported architecture, invalid options, or rows that do not fit the model.
    """
    dense = CopiedLayers(model, task, processes)
    check_options(dense.anatomy, options, planned=plan is not None)
    check_shareable(options, len(rows), processes, planned=plan is not None)
    layers = windowed(dense, rows, options, plan)
    dropped = what_to_drop(layers, rows, options) if plan is None else plan.all_dropped
    narrowing = narrowing_of(layers, rows, options, plan)
    cut: dict[str, Tensor] = {}
    made = prune_layers(layers, rows, options, cut.update, known, dropped, plan, narrowing)
    pruned = assemble(model, config_after(layers, made), cut, narrowing)
    return Pruned(pruned, made, budget_of(dense.anatomy), budget_of(read_anatomy(pruned.config)))


def what_to_drop(layers: Layers, rows: Tensor, options: PruneOptions) -> Sequence[DroppedLayer | DroppedBlock]:
    """Return the layers, or the blocks, to drop by these options (depth.py)."""
    if options.refine != "none":
        check_searchable(len(rows), resident=layers.resident)
    ratio, batch_size = 1.0 if options.budgets else options.ratio, options.batch_size
    if options.drop_blocks:
        names = options.limits.protected(layers.anatomy)
        return choose_blocks(layers, rows, options.drop_blocks, ratio, names, batch_size)
    protected = protected_layers(layers.anatomy, options)
    return choose(layers, rows, options.drop_layers, ratio, protected, batch_size)


def narrowing_of(layers: Layers, rows: Tensor, options: PruneOptions, plan: Plan | None = None) -> Narrowing | None:
    """Return how the residual stream becomes narrower by these options or this plan; None: it stays.

    Directions are found on the rows, also if a plan says how many to keep.

    Raises:
        InputError: the rows do not fit the model, or hidden states or gradients overflow.
    """
    if options.hidden_size is None:
        return None
    if plan is not None and plan.hidden is not None and plan.hidden.basis == "coordinates":
        return Narrowing(torch.tensor(plan.hidden.kept))
    moments = basis.measure(layers, rows, options.batch_size, seed=options.seed)
    return basis.choose(moments, options.hidden_size, options.basis)


def config_after(layers: Layers, plan: Plan) -> PreTrainedConfig:
    """Return the configuration of the model after applying `plan`."""
    with_bias, dropped = plan.compensation == "bias", plan.dropped_layers()
    return pruned_config(layers.config, plan.result(layers.anatomy), with_bias=with_bias, dropped=dropped)


@torch.no_grad()
def prune_layers(
    layers: Layers,
    rows: Tensor,
    options: PruneOptions,
    sink: Sink,
    known: Known | None = None,
    dropped: Sequence[DroppedLayer | DroppedBlock] = (),
    plan: Plan | None = None,
    narrowing: Narrowing | None = None,
) -> Plan:
    """Prune layer by layer: pass the remaining tensors of each decoder layer to `sink`, and return the plan.

    Modules outside the layers are neither pruned nor passed on. Tensors have their names in the result, where layers
    after a dropped one have lower indices.

    Args:
        layers: of a supported model, computing in float32; as returned by `windowed` for these options.
        rows: (N, S) int64 calibration tokens.
        options: what to remove and how.
        sink: takes the tensors by full name.
        known: as for `prune`; ignored if something is dropped, or layers get windows.
        dropped: as returned by `what_to_drop` for these options, or that of `plan`.
        plan: what to keep; nothing is scored then. It must have passed `check_plan`, and `options` must be its
            `options_of`.
        narrowing: as returned by `narrowing_of` for these arguments; its `head` is set. It says how to cut the modules
            outside the layers.

    Raises:
        InputError: invalid options, or rows that do not fit the model.
    """
    rest = _rest(layers, rows, options, known, dropped, narrowing, planned=plan is not None)
    anatomy, options = rest.layers.anatomy, rest.options
    if rest.removes_nothing(plan):
        kept = {block.name: whole(block) for block in anatomy.blocks}
        for index in progress(range(anatomy.layers), "copy", "layer"):
            with rest.layers.layer(index) as layer:
                sink(cut_layer(layer, anatomy.of_layer(index), kept, {}))
        return rest.describe(rows, kept, {}, everything())
    if options.compensation in REFITTING:
        warn_of_few(rows, anatomy)
    walker = Walker(rest.layers, rows.shape[1:], options.batch_size)
    chosen = chooser(walker, rows, options, rest.known) if plan is None else planned(plan, rest.names())
    coordinates = narrowing.kept if narrowing else None
    gone = None if coordinates is None else removed(coordinates, anatomy.hidden_size)
    inputs: Inputs = (
        PropagatedInputs(walker, rows, options.compensation, gone)
        if rest.known is None or rest.known.moments is None or options.compensation in FROM_PRUNED_PREFIX
        else PrecomputedInputs(rest.known.moments)
    )
    dense = Walker(rest.whole, rows.shape[1:], options.batch_size)
    kept = {}
    dampings: dict[str, float | None] = {}  # block name -> of its least squares
    index = 0  # in what is left of the model
    for number in progress(range(layers.anatomy.layers), "prune", "layer"):
        if number in rest.gone:
            inputs.drop(dense, number)
            continue
        blocks = anatomy.of_layer(index)
        biases: dict[str, Tensor] = {}
        with rest.layers.layer(index) as layer:
            for block in blocks:
                if not block.units:
                    kept[block.name] = nothing(block)
                    if block.name in rest.lost:
                        (lost,) = (one for one in rest.whole.anatomy.of_layer(number) if one.name == block.name)
                        inputs.drop(dense, number, lost)
                    continue
                if coordinates is not None:
                    inputs.refit_readers(layer, block, coordinates, options.damping)
                if block.routing is not None:
                    assert isinstance(inputs, PropagatedInputs)
                    left = kept[block.name] = chosen.choice(layer, block, inputs.experts(layer, block))
                    if gone is not None:
                        silence(layer, block, gone)
                    gamma = options.damping if is_fitted(block, left.size, options) else None
                    dampings[block.name] = finish_experts(layer, block, left, inputs, gamma)
                    continue
                if is_reduced(block, chosen.size(block)):
                    inputs.reduce_scores(layer, block, chosen.size(block).members, options.damping)
                moments = inputs.moments(layer, block)
                if gone is not None:
                    silence(layer, block, gone)
                weight = consumer_weight(layer, block).double()
                left = kept[block.name] = chosen.choice(layer, block, moments)
                damping = consumer_damping(
                    consumer_of(layer, block), weight, block, left, moments, inputs.held_out, options
                )
                dampings[block.name] = damping if is_fitted(block, left.size, options) else None
                bias = compensate(layer, weight, block, left, moments, damping, options)
                if bias is not None:
                    biases[block.name] = bias
                inputs.pass_on(layer, block, left, damping)
            sink(cut_layer(layer, blocks, kept, biases, coordinates))
        index += 1
    if narrowing is not None and coordinates is not None and not rest.whole.anatomy.is_tied:
        narrowing.head = inputs.head_map(coordinates, options.damping)
    return rest.describe(rows, kept, dampings, chosen)


@torch.no_grad()
def plan_layers(
    layers: Layers,
    rows: Tensor,
    options: PruneOptions,
    known: Known | None = None,
    dropped: Sequence[DroppedLayer | DroppedBlock] = (),
    narrowing: Narrowing | None = None,
) -> Plan:
    """Return a plan without pruning anything, for `prune_layers` to follow.

    It has the same sizes that `prune_layers` would choose. Units are chosen by the inputs of the dense model's
    consumers; `prune_layers` by itself would use the pruned prefix if the compensation does, so some of the units can
    differ.

    The arguments are those of `prune_layers`.
    """
    rest = _rest(layers, rows, options, known, dropped, narrowing)
    if rest.removes_nothing():
        kept = {block.name: whole(block) for block in rest.layers.anatomy.blocks}
        return rest.describe(rows, kept, {}, everything())
    walker = Walker(rest.layers, rows.shape[1:], options.batch_size)
    chosen = chooser(walker, rows, rest.options, rest.known)
    inputs = dense_inputs(walker, rows, rest.known)
    kept = {block.name: nothing(block) for block in rest.layers.anatomy.blocks}
    for layer, block in blocks_of(rest.layers):
        kept[block.name] = chosen.choice(layer, block, dense_reading(layer, block, inputs))
    return rest.describe(rows, kept, {}, chosen)


@dataclass(frozen=True)
class _Rest:
    """The model without its dropped layers or blocks, if any.

    Attributes:
        whole: the model with all its layers, rotated if the narrowing says so.
        layers: without the dropped ones, renumbered, or without the dropped blocks.
        asked: the options as given.
        options: for `layers`, with the ratio of their own parameters.
        known: data already collected from `layers`.
        dropped: the missing layers or blocks.
        narrowing: of the residual stream; None: it stays.
        spanning: `whole` if layers get windows; None: they do not.
    """

    whole: Layers
    layers: Layers
    asked: PruneOptions
    options: PruneOptions
    known: Known | None
    dropped: Sequence[DroppedLayer | DroppedBlock]
    narrowing: Narrowing | None
    spanning: Windowed | None

    @property
    def gone(self) -> list[int]:
        return [drop.layer for drop in self.dropped if isinstance(drop, DroppedLayer)]

    @property
    def lost(self) -> list[str]:
        return [drop.block for drop in self.dropped if isinstance(drop, DroppedBlock)]

    def removes_nothing(self, plan: Plan | None = None) -> bool:
        """Return whether the model only gets windows; `plan`: that is followed, if any."""
        if self.spanning is None or self.dropped or self.narrowing is not None:
            return False
        if plan is not None:
            return plan.sizes() == {block.name: block.size for block in self.layers.anatomy.blocks}
        return not self.options.ratio and not self.options.budgets

    def names(self) -> dict[str, str]:
        """Return block name here -> block name in the whole model."""
        before = [block.name for block in self.whole.anatomy.blocks if block.layer not in self.gone]
        return {block.name: name for block, name in zip(self.layers.anatomy.blocks, before, strict=True)}

    def describe(
        self,
        rows: Tensor,
        kept: Mapping[str, Kept],
        dampings: Mapping[str, float | None],
        chosen: Chosen,
    ) -> Plan:
        """Return the plan with the block names of the whole model; the arguments use the names here."""
        blocks = {block.name: BlockPlan.of(block, nothing(block), None) for block in self.whole.anatomy.blocks}
        names = self.names()
        blocks |= {
            names[block.name]: BlockPlan.of(
                block, kept[block.name], dampings.get(block.name), chosen.schemes.get(block.name)
            )
            for block in self.layers.anatomy.blocks
            if block.name not in self.lost
        }
        hidden = None
        if self.narrowing is not None:
            which: Basis = "coordinates" if self.narrowing.rotation is None else "fisher"
            hidden = HiddenPlan(size=self.whole.anatomy.hidden_size, kept=self.narrowing.kept.tolist(), basis=which)
        plan = describe(self.whole.anatomy, rows, self.asked, blocks, chosen.splits, self.dropped, hidden)
        made: dict[str, Any] = {"refinement": chosen.refinement, "price": chosen.price}
        if self.spanning is not None:
            spans, dense = self.spanning.spans, self.spanning.dense.anatomy
            made |= {"family": dense.family, "windowed": list(spans.layers), "window_prices": spans.prices}
        return plan.model_copy(update=made)


def _rest(
    layers: Layers,
    rows: Tensor,
    options: PruneOptions,
    known: Known | None,
    dropped: Sequence[DroppedLayer | DroppedBlock],
    narrowing: Narrowing | None,
    *,
    planned: bool = False,
) -> _Rest:
    """Check everything and return the part to prune. Raises InputError."""
    if options.shapes:
        raise ValueError("the options have several shapes; choose_shape takes one of them")
    if len(dropped) != options.drop_layers + options.drop_blocks:
        raise ValueError(f"{len(dropped)} layers or blocks are dropped, and the options say another number")
    if (len(narrowing.kept) if narrowing else None) != options.hidden_size:
        raise ValueError(f"the options say hidden_size {options.hidden_size}, and the narrowing is another")
    spanning = layers if isinstance(layers, Windowed) else None
    if (spanning.spans.window if spanning else None) != options.window:
        raise ValueError(f"the options say window {options.window}, and the layers have another")
    asked, options = options, without_windows(options)
    known = None if spanning else known
    check_options(layers.anatomy, options, planned=planned)
    check_rows(layers.anatomy, rows)
    check_shareable(options, len(rows), layers.processes, planned=planned)
    if options.refine != "none":
        check_searchable(len(rows), resident=layers.resident)
    if narrowing is not None and narrowing.rotation is not None:
        rotated = RotatedLayers(layers, narrowing.rotation)
        options = around_left(options, layers.anatomy, rotated.anatomy)
        layers, known = rotated, None
    if known and (layers.anatomy.of_kind("experts") or "qk-dims" in options.axes):
        known = replace(known, moments=None)  # what is refitted beside consumers needs a pass of its own
    if not dropped:
        return _Rest(layers, layers, asked, options, known, (), narrowing, spanning)
    rest = _Rest(layers, layers, asked, options, None, dropped, narrowing, spanning)
    _, left = left_of(layers.anatomy, replace(options, hidden_size=None), rest.gone, rest.lost)
    left = replace(left, hidden_size=options.hidden_size)
    without = Sparser(layers, rest.lost) if rest.lost else Shallower(layers, rest.gone)
    return replace(rest, layers=without, options=left)


def describe(
    anatomy: Anatomy,
    rows: Tensor,
    options: PruneOptions,
    blocks: dict[str, BlockPlan],
    splits: list[PricedSplit] | None = None,
    dropped: Sequence[DroppedLayer | DroppedBlock] = (),
    hidden: HiddenPlan | None = None,
) -> Plan:
    """Return the plan of these blocks, splits, layers and coordinates; its other fields are known before the run."""
    return Plan(
        family=anatomy.family,
        criterion=options.criterion,
        allocation=options.allocation,
        compensation=options.compensation,
        ratio=options.ratio,
        target=options.target,
        axes=list(options.axes),
        keep=list(options.keep),
        floors=dict(options.floors),
        skips=options.skips,
        budget=options.budget,
        time_budget=options.time_budget,
        kv_budget=options.kv_budget,
        sequence_budget=options.sequence_budget,
        window=options.window,
        window_layers=options.window_layers,
        drop_layers=options.drop_layers,
        drop_blocks=options.drop_blocks,
        damping=options.damping,
        seed=options.seed,
        calibration=Calibration(
            digest=rows_digest(rows), rows=rows.shape[0], sequence_length=anatomy.tokens_of(rows.shape[1:])
        ),
        dropped=[drop for drop in dropped if isinstance(drop, DroppedLayer)],
        dropped_blocks=[drop for drop in dropped if isinstance(drop, DroppedBlock)],
        hidden=hidden,
        splits=splits,
        blocks=blocks,
    )


def dense_moments(layers: Layers, rows: Tensor, batch_size: int = 8) -> Iterator[tuple[str, Moments]]:
    """Yield name and moments of every block that has units, except experts, in the order of the forward pass."""
    walk = PropagatedInputs(Walker(layers, rows.shape[1:], batch_size), rows)
    for index in progress(range(layers.anatomy.layers), "calibrate", "layer"):
        with layers.layer(index) as layer:
            for block in layers.anatomy.of_layer(index):
                if block.routing is not None:
                    walk.experts(layer, block)
                    walk.pass_experts_on(layer, block)
                elif block.units:
                    yield block.name, walk.moments(layer, block)
