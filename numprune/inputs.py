"""The inputs of a model's consumers during pruning: collected block by block, or known beforehand."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from numprune import scores
from numprune.blocks import Block
from numprune.calibration import BlockRun, Walker, consumer_of, consumer_weight
from numprune.experts.inputs import Experts, Routed, Seen
from numprune.experts.refit import Batch
from numprune.hidden import EPSILON, norm_of
from numprune.joint import Aims, fits_producer, refit_producer
from numprune.layers import device_of
from numprune.moments import Moments
from numprune.readers import ReadMap, copy_readers, fit_read_map, has_biases, refit_readers
from numprune.scores import Directions, ScoreMoments
from numprune.slices import Kept
from numprune.surgery import channels_of

FROM_PRUNED_PREFIX = ("sequential", "residual", "joint")  # compensations with inputs from the pruned prefix
_PRICED_ROWS = 4  # every fourth row prices dimensions of queries and keys
_HELD_OUT = 4  # every fourth calibration row, for choosing the damping


class Inputs(Protocol):
    """The consumers' inputs, block by block in the order of the forward pass."""

    def moments(self, layer: nn.Module, block: Block) -> Moments:
        """Return the moments of the block's inputs, and of its targets unless they are its own outputs."""

    @property
    def held_out(self) -> Moments | None:
        """Moments of every fourth row, if the targets of `moments` are not determined by the inputs."""

    def refit_readers(self, layer: nn.Module, block: Block, kept: Tensor, damping: float) -> None:
        """Refit the matrices with which the block reads the narrower stream, in place, if the prefix is pruned.

        Args:
            layer: the block's, with the dense model's weights in this block.
            kept: (K,) coordinates of the stream.
            damping: the smallest one tried.
        """

    def reduce_scores(self, layer: nn.Module, block: Block, kept: int, damping: float) -> None:
        """Reduce queries and keys to `kept` dimensions of each head, in place: the first, and the others are zero.

        Args:
            layer: the block's, with the dense model's weights in this block.
            damping: of the fit.
        """

    def errors_of_dims(self, layer: nn.Module, block: Block, dims: Iterable[int]) -> dict[int, Tensor]:
        """Return `scores.errors_of_dims` of the dense model's block, on some of the rows."""

    def head_map(self, kept: Tensor, damping: float) -> Tensor | None:
        """Return `Narrowing.head` for the prefix that all blocks were passed on to, if it is pruned."""

    def pass_on(self, layer: nn.Module, block: Block, kept: Kept, damping: float) -> None:
        """Pass the outputs of the block, now pruned to `kept`, on to the blocks after it."""

    def drop(self, walker: Walker, index: int, block: Block | None = None) -> None:
        """Pass layer `index` of the model of `walker`, or a block of it, which the pruned model does not have."""


class PropagatedInputs:
    """Inputs collected during the pass over the model, from the dense or the pruned prefix.

    The targets are the dense block's outputs. For `residual` and `joint`, they also include what moves the pruned
    model's residual stream to the dense model's after the block (before the norm there, if the sum of both is normed).
    If a norm lies between the consumer and the stream, no output could achieve that, and the targets are always the
    dense block's outputs. Inputs of a block with fewer dimensions of queries and keys are its own, whatever the prefix.

    Args:
        gone: coordinates of the residual stream that the pruned model lacks: zero there, and in the targets. None: all
            are kept.

    Attributes:
        processes: that share the rows.
    """

    def __init__(self, walker: Walker, rows: Tensor, compensation: str = "none", gone: Tensor | None = None) -> None:
        self._rows, share = len(rows), walker.share(len(rows))
        self._walker, self.processes = walker, walker.layers.processes
        self._dense = walker.embed(rows[share], share.start)
        self._pruned = walker.copy(self._dense, gone) if compensation in FROM_PRUNED_PREFIX else self._dense
        self._gone = gone
        self._residual = compensation in ("residual", "joint")
        self._both_sides = compensation == "joint"
        # The layer before its readers were refitted, or its queries and keys reduced: for the dense stream.
        self._unfitted: nn.Module | None = None
        self._targets: Tensor | None = None  # (N, S, out), if the streams after the block do not determine them
        self._read: Tensor | None = None  # inputs of the consumers in the pruned model
        self.held_out: Moments | None = None

    @property
    def from_pruned_prefix(self) -> bool:
        """Whether inputs come from the pruned prefix, so that they do not determine the targets."""
        return self._pruned is not self._dense

    def refit_readers(self, layer: nn.Module, block: Block, kept: Tensor, damping: float) -> None:
        if not self.from_pruned_prefix:
            return
        blocks = [other for other in self._walker.layers.anatomy.of_layer(block.layer) if other.units]
        norm = layer.get_submodule(norm_of(blocks, block))
        self._unfitted = copy_readers(layer, block)
        device, centred = device_of(layer, self._walker.layers.device), has_biases(layer, block)
        refit_readers(layer, block, kept, self._read_map(norm, block, device, kept, damping, centred=centred))

    def reduce_scores(self, layer: nn.Module, block: Block, kept: int, damping: float) -> None:
        walker, dense, pruned = self._walker, self._dense, self._pruned
        self._unfitted = scores.unreduced(layer, block)
        found = ScoreMoments.empty(*block.size, consumer_weight(layer, block).device)
        with torch.no_grad():
            for stream in (dense, pruned):
                stream.enter(block)
            for batch in walker.batches(len(dense)):
                theirs = scores.of_run(walker, layer, block, dense.read(batch))
                ours = theirs if pruned is dense else scores.of_run(walker, layer, block, pruned.read(batch))
                found.add(ours, theirs)
            found.add_up(self.processes)
        scores.reduce(layer, block, kept, Directions.of(found, damping))

    def errors_of_dims(self, layer: nn.Module, block: Block, dims: Iterable[int]) -> dict[int, Tensor]:
        self._dense.enter(block)
        rows = self._dense.read(slice(None))[-self._dense.first % _PRICED_ROWS :: _PRICED_ROWS]
        return scores.errors_of_dims(self._walker, layer, block, rows, dims)

    def head_map(self, kept: Tensor, damping: float) -> Tensor | None:
        if not self.from_pruned_prefix:
            return None
        epsilon = getattr(self._walker.layers.config, EPSILON)

        def norm(hidden: Tensor) -> Tensor:
            return functional.rms_norm(hidden, hidden.shape[-1:], eps=epsilon)

        return self._read_map(norm, None, self._walker.layers.device, kept, damping).columns

    def _read_map(
        self,
        norm: Callable[[Tensor], Tensor],
        block: Block | None,
        device: torch.device,
        kept: Tensor,
        damping: float,
        *,
        centred: bool = False,
    ) -> ReadMap:
        """Fit what is read of the pruned stream to what is read of the dense one, in front of `block` or behind all.

        `device`: of the norm.
        """
        walker, dense, pruned = self._walker, self._dense, self._pruned
        size = dense.hidden.shape[-1]
        moments, held_out = (Moments(len(kept), size, device) for _ in range(2))
        for stream in (dense, pruned):
            if block is not None:
                stream.enter(block)
        for batch in walker.batches(len(dense)):
            ours, theirs = (
                norm((stream.hidden[batch] if block is None else stream.read(batch)).to(device))
                for stream in (pruned, dense)
            )
            split_rows(batch, ours[..., kept], theirs, moments, held_out, dense.first)
        moments.add_up(self.processes)
        held_out.add_up(self.processes)
        moments.absorb(held_out)
        moments.require_finite("residual stream")
        return fit_read_map(kept, size, moments, held_out if held_out.count else None, damping, centred=centred)

    def moments(self, layer: nn.Module, block: Block) -> Moments:
        walker, dense, pruned = self._walker, self._dense, self._pruned
        weight, own_layer = consumer_weight(layer, block), self._dense_layer(layer)
        # The dense block's own outputs follow from its inputs, so their moments are not collected.
        of_dense = pruned is dense and own_layer is layer
        outputs = 0 if of_dense else weight.shape[0]
        moments, self.held_out = Moments(block.channels, outputs, weight.device), None
        if of_dense:
            for batch, run in walker.run(layer, block, dense):
                moments.add(run.inputs)
                dense.write(batch, run.after)
            moments.add_up(self.processes)
        else:
            held_out = Moments(block.channels, outputs, weight.device)
            room = self._consumer_room(block)
            both = zip(walker.run(own_layer, block, dense), walker.inputs(layer, block, pruned), strict=True)
            for (batch, own), (_, inputs) in both:
                split_rows(batch, inputs, self._target(block, batch, own), moments, held_out, dense.first)
                room[batch] = inputs.to(room.device)
                dense.write(batch, own.after)
            moments.add_up(self.processes)
            held_out.add_up(self.processes)
            moments.absorb(held_out)
            self.held_out = held_out if held_out.count else None
        moments.require_finite(f"{block.path}.{block.consumer}")
        return moments

    def experts(self, layer: nn.Module, block: Block) -> Seen:
        """Return statistics of the layer's experts. The streams stay in front of them until `pass_experts_on`."""
        dense, pruned = self._dense, self._pruned
        outputs, own_layer = self._room(), self._dense_layer(layer)
        length = dense.hidden.shape[1]
        seen = Seen(Experts(layer, block), self._rows * length, dense.first * length)
        for batch, own in self._walker.run(own_layer, block, dense):
            outputs[batch] = own.output
            if pruned is dense:
                seen.add(_routed(own))
        if pruned is not dense:
            for _, run in self._walker.run(layer, block, pruned):
                seen.add(_routed(run))
        seen.add_up(self.processes)
        for expert, moments in enumerate(seen.moments):
            moments.require_finite(f"{block.path}.{block.consumer}, expert {expert}")
        return seen

    def to_fit(self, layer: nn.Module, block: Block) -> Iterator[Batch]:
        """Yield inputs and desired outputs of the experts of a layer that has only the kept ones."""
        outputs = self._room()
        experts = Experts(layer, block)
        for batch, run in self._walker.run(layer, block, self._pruned):
            target = outputs[batch]
            if self._residual:
                target = target + self._missing(batch)
            target = self._kept(target)
            held_out = _held_out_rows(batch, self._dense.first)[:, None].expand(target.shape[:2])
            device = run.output.device
            yield Batch(
                list(experts.shares(_routed(run))), target.flatten(0, 1).to(device), held_out.flatten().to(device)
            )

    def pass_experts_on(self, layer: nn.Module, block: Block) -> None:
        """Pass the outputs of a layer with only the kept experts on to the next."""
        scale = self._walker.layers.anatomy.residual_scale
        self._dense.hidden.add_(self._room(), alpha=scale)
        if self._pruned is not self._dense:
            self._walker.advance(layer, block, self._pruned)

    def pass_on(self, layer: nn.Module, block: Block, kept: Kept, damping: float) -> None:
        if self._pruned is self._dense or not kept.size.units:
            return
        walker, pruned = self._walker, self._pruned
        channels, room = channels_of(block, kept), self._consumer_room(block)
        weight, bias = consumer_weight(layer, block)[:, channels], consumer_of(layer, block).bias

        def consumed(batch: slice) -> Tensor:
            return room[batch].to(weight.device)[..., channels]

        if self._both_sides and fits_producer(walker.layers.anatomy, block):
            small = refit_producer(walker, layer, block, kept, pruned, consumed, self._aims(block), damping)
            walker.advance(small, block.resized(kept.size), pruned)
        else:
            for batch in walker.batches(len(pruned)):
                walker.give(layer, block, pruned, batch, functional.linear(consumed(batch), weight, bias))

    def drop(self, walker: Walker, index: int, block: Block | None = None) -> None:
        if self._pruned is self._dense:
            return
        with walker.layers.layer(index) as layer:
            if block is None:  # of a model in stages, no layer is dropped
                walker.through(layer, index, self._dense.hidden, self._dense.hidden)
            else:
                walker.advance(layer, block, self._dense)

    def _dense_layer(self, layer: nn.Module) -> nn.Module:
        """Return the layer for the dense stream, once per block."""
        found, self._unfitted = self._unfitted or layer, None
        return found

    def _target(self, block: Block, batch: slice, own: BlockRun) -> Tensor:
        """Return the desired output of the pruned block; `own` is the dense one, whose stream is not yet written."""
        if not self._residual:
            return self._kept(own.output)
        target = own.output
        if not block.norm_behind:
            target = target + self._missing(batch).to(target.device)
        target = self._kept(target)
        if self._both_sides and _followed_by_norm(block):
            room = self._room()
            room[batch] = target.to(room.device)
        return target

    def _kept(self, hidden: Tensor) -> Tensor:
        """Return (…, H) with zero in the coordinates that the pruned model lacks."""
        return hidden if self._gone is None else hidden.index_fill(-1, self._gone.to(hidden.device), 0)

    def _missing(self, batch: slice) -> Tensor:
        """Return the output with which a block would move the pruned stream to the dense one."""
        missing = self._dense.hidden[batch] - self._pruned.hidden[batch]
        return missing / self._walker.layers.anatomy.residual_scale

    def _room(self) -> Tensor:
        """Return the buffer for outputs of all rows, (N, S, H)."""
        shape = self._dense.hidden.shape
        if self._targets is None or self._targets.shape != shape:
            self._targets = self._walker.layers.allocate(*shape)
        return self._targets

    def _consumer_room(self, block: Block) -> Tensor:
        """Return the buffer for the consumer's inputs of all rows, (N, S, D), shared by all blocks in turn."""
        layers, row, rows = self._walker.layers, self._walker.row, len(self._dense)
        length, _ = layers.anatomy.stream_of(row, block.layer)
        if self._read is None:
            self._read = layers.allocate(rows * layers.anatomy.largest_inputs(row))
        return self._read[: rows * length * block.channels].view(rows, length, -1)

    def _aims(self, block: Block) -> Aims:
        """Return the targets again, with the dense stream now after the block."""
        if _followed_by_norm(block):
            assert self._targets is not None
            return Aims(self._targets)
        return Aims(self._dense.hidden, self._pruned.hidden, self._walker.layers.anatomy.residual_scale)


def _followed_by_norm(block: Block) -> bool:
    """Return whether a norm hides the block's output from the stream after it."""
    return block.norm_behind or bool(block.post_norms)


def split_rows(
    batch: slice, inputs: Tensor, targets: Tensor, fitted: Moments, held_out: Moments, first: int = 0
) -> None:
    """Add the inputs (n, S, D) and targets (n, S, out) of the rows `batch` to the moments of their split.

    `first`: number of rows before these that other processes have.
    """
    held = _held_out_rows(batch, first).to(inputs.device)
    fitted.add(inputs[~held], targets[~held])
    held_out.add(inputs[held], targets[held])


def _held_out_rows(batch: slice, first: int) -> Tensor:
    """Which rows of the batch are held out, (n,) bool."""
    return torch.arange(first + batch.start, first + batch.stop) % _HELD_OUT == _HELD_OUT - 1


def _routed(run: BlockRun) -> Routed:
    assert run.routed is not None
    return run.routed


class PrecomputedInputs:
    """Inputs of the dense model, collected earlier."""

    held_out = None

    def __init__(self, moments: Mapping[str, Moments]) -> None:
        self._moments = moments

    def moments(self, layer: nn.Module, block: Block) -> Moments:
        return self._moments[block.name]

    def refit_readers(self, layer: nn.Module, block: Block, kept: Tensor, damping: float) -> None:
        pass

    def reduce_scores(self, layer: nn.Module, block: Block, kept: int, damping: float) -> None:
        raise ValueError("queries and keys were not collected")

    def errors_of_dims(self, layer: nn.Module, block: Block, dims: Iterable[int]) -> dict[int, Tensor]:
        raise ValueError("queries and keys were not collected")

    def head_map(self, kept: Tensor, damping: float) -> Tensor | None:
        return None

    def pass_on(self, layer: nn.Module, block: Block, kept: Kept, damping: float) -> None:
        pass

    def drop(self, walker: Walker, index: int, block: Block | None = None) -> None:
        pass
