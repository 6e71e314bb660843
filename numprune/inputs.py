"""What the consumers of a model read while it is pruned: collected block by block, or known before."""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from numprune.anatomy import Block
from numprune.calibration import Run, Walker, consumer_weight
from numprune.joint import Aims, refit_both
from numprune.moments import Moments
from numprune.slices import Kept

FROM_PRUNED_PREFIX = ("sequential", "residual", "joint")  # compensations that read what the pruned blocks before give
_HELD_OUT = 4  # every fourth calibration row, for choosing the damping


class Inputs(Protocol):
    """What the consumers read, block by block in the order of the forward pass."""

    def moments(self, layer: nn.Module, block: Block) -> Moments:
        """Return the moments of the block's inputs, and of its targets where they are not its own outputs on them."""

    @property
    def held_out(self) -> Moments | None:
        """Those of every fourth row alone, where `moments` had targets that the inputs do not determine."""

    def pass_on(self, layer: nn.Module, block: Block, kept: Kept, damping: float) -> None:
        """The block has been pruned to `kept`: what comes after it reads what it gives now."""


class Walked:
    """Collected as the model is walked, from the dense model's prefix or from the pruned one's.

    The targets are the dense block's outputs; for `residual` and `joint`, what takes the pruned model's residual stream
    to where the dense model's is behind the block. Where a norm stands between the consumer and the stream, no output
    could do that: the targets are the dense block's outputs in any case.
    """

    def __init__(self, walker: Walker, rows: Tensor, compensation: str = "none") -> None:
        self._walker = walker
        self._dense = walker.embed(rows)
        self._pruned = walker.copy(self._dense) if compensation in FROM_PRUNED_PREFIX else self._dense
        self._residual = compensation in ("residual", "joint")
        self._both_sides = compensation == "joint"
        self._outputs: Tensor | None = None  # the dense block's, (N, S, out), where they are targets again
        self.held_out: Moments | None = None

    def moments(self, layer: nn.Module, block: Block) -> Moments:
        walker, dense, pruned = self._walker, self._dense, self._pruned
        weight = consumer_weight(layer, block)
        # The dense block's own outputs follow from its inputs: their moments are not collected.
        outputs = 0 if pruned is dense else weight.shape[0]
        moments = Moments(block.channels, outputs, weight.device)
        if pruned is dense:
            for batch, run in walker.run(layer, block, dense):
                moments.add(run.inputs)
                dense.write(batch, run.after)
        else:
            held_out = Moments(block.channels, outputs, weight.device)
            both = zip(walker.run(layer, block, dense), walker.run(layer, block, pruned), strict=True)
            for (batch, own), (_, run) in both:
                split_rows(batch, run.inputs, self._target(block, batch, own), moments, held_out)
                dense.write(batch, own.after)
            moments.absorb(held_out)
            self.held_out = held_out if held_out.count else None
        return moments

    def pass_on(self, layer: nn.Module, block: Block, kept: Kept, damping: float) -> None:
        if self._both_sides and kept.size.units and block.linear is not None:
            refit_both(self._walker, layer, block, kept, self._pruned, self._aims(block), damping)
        if self._pruned is not self._dense:
            self._walker.advance(layer, block, self._pruned)

    def _target(self, block: Block, batch: slice, own: Run) -> Tensor:
        """What the pruned block should put out: `own` is what the dense one does, whose stream is not yet written."""
        if not self._residual:
            return own.output
        if block.norm_behind:
            if self._both_sides:
                if self._outputs is None:
                    self._outputs = self._walker.layers.allocate(*self._dense.hidden.shape)
                self._outputs[batch] = own.output
            return own.output
        missing = self._dense.hidden[batch] - self._pruned.hidden[batch]
        return own.output + missing.to(own.output.device) / self._walker.layers.anatomy.residual_scale

    def _aims(self, block: Block) -> Aims:
        """The targets once more, the dense stream being behind the block."""
        if block.norm_behind:
            assert self._outputs is not None
            return Aims(self._outputs)
        return Aims(self._dense.hidden, self._pruned.hidden, self._walker.layers.anatomy.residual_scale)


def split_rows(batch: slice, inputs: Tensor, targets: Tensor, fitted: Moments, held_out: Moments) -> None:
    """Add the inputs (n, S, D) and targets (n, S, out) of the rows `batch` to the moments each row belongs to."""
    held = torch.arange(batch.start, batch.stop, device=inputs.device) % _HELD_OUT == _HELD_OUT - 1
    fitted.add(inputs[~held], targets[~held])
    held_out.add(inputs[held], targets[held])


class Collected:
    """Those of the dense model, collected before."""

    held_out = None

    def __init__(self, moments: Mapping[str, Moments]) -> None:
        self._moments = moments

    def moments(self, layer: nn.Module, block: Block) -> Moments:
        return self._moments[block.name]

    def pass_on(self, layer: nn.Module, block: Block, kept: Kept, damping: float) -> None:
        pass
