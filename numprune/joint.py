"""Both sides of what is left of a block fitted to its targets: the consumer, and the producer that it reads linearly.

A block's output is linear in its consumer, and with the consumer given it is linear in one of its producers, too: in
the values' projection, since the attention weights do not depend on it, and in the one whose output an MLP's gate
multiplies. So the kept units' rows of that producer can be fitted to the same targets by least squares. Their
normal equations are too large to be written down, (K H)^2 values, but not to be multiplied with: one forward and one
backward pass of the block. A few steps of conjugate gradients, preconditioned by the Kronecker product of the input's
Gram matrix and a diagonal, do most of it; then the consumer is fitted again. All of it is ridge regression towards the
original weights, as in compensation.py.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from numprune.blocks import Block
from numprune.calibration import Stream, Walker, consumer_of, consumer_weight
from numprune.compensation import refit
from numprune.linalg import cholesky, damped
from numprune.moments import Moments
from numprune.slices import Kept
from numprune.surgery import channels_of, narrowed

STEPS = 4  # on the one model and ratio tried, eight gave about a seventh more of the gain for twice the work


@dataclass(frozen=True)
class Aims:
    """What a block should put out: (goal - start) / scale, all (N, S, H); without `start`, the goal itself."""

    goal: Tensor
    start: Tensor | None = None
    scale: float = 1.0

    def of(self, batch: slice, device: torch.device) -> Tensor:
        """Return that of a batch of rows, (n, S, H)."""
        aim = self.goal[batch] if self.start is None else self.goal[batch] - self.start[batch]
        return aim.to(device) / self.scale


@torch.no_grad()
def refit_both(
    walker: Walker, layer: nn.Module, block: Block, kept: Kept, pruned: Stream, aims: Aims, damping: float
) -> None:
    """Overwrite what is kept of the linear producer's and the consumer's weights with fitted ones.

    Args:
        walker: of the model.
        layer: the block's decoder layer, the consumer fitted already.
        block: with a producer that it is linear in.
        kept: of the block, at least one unit.
        pruned: the pruned model's residual stream in front of the block.
        aims: what the block should put out there.
        damping: relative to the mean of the normal equations' diagonals.
    """
    small = narrowed(layer, block, kept)
    left = block.resized(kept.size)
    _refit_producer(walker, small, left, pruned, aims, damping)
    weight = consumer_weight(small, left)
    moments = Moments(left.channels, outputs=weight.shape[0], device=weight.device)
    for batch, run in walker.run(small, left, pruned):
        moments.add(run.inputs, aims.of(batch, weight.device))
    every = torch.arange(left.channels, device=weight.device)
    own = consumer_of(small, left).bias
    columns, bias = refit(weight.double(), None if own is None else own.double(), every, moments, damping)
    consumer_weight(layer, block)[:, channels_of(block, kept)] = columns.to(weight.dtype)
    if bias is not None:
        consumer_of(layer, block).bias.copy_(bias)
    _Producer(layer, block).put(kept, _Producer(small, left).get())


def _refit_producer(walker: Walker, layer: nn.Module, block: Block, pruned: Stream, aims: Aims, damping: float) -> None:
    """Fit W of the linear producer: minimise E||t - y(W)||^2 / 2 + the ridge, y affine in W, from W as it stands."""
    producer = _Producer(layer, block)
    start = producer.get()
    seen = _Seen(layer, block, producer)
    with seen.watching():
        at_start = _gradient(walker, layer, block, producer, pruned, aims)
    curvature = _Curvature(seen, damping)
    step = torch.zeros_like(at_start)
    residual = -at_start
    direction = preconditioned = curvature.solve(residual)
    fit = (residual * preconditioned).sum()
    for _ in range(STEPS):
        if not fit > 0:  # nothing left to gain
            break
        # The gradient is affine in W: its change along a direction is the Hessian's product with it. The change is
        # taken over a distance of W's own size, so that little is lost to rounding.
        distance = start.norm() / direction.norm()
        producer.put(producer.every, start + distance * direction)
        gradient = _gradient(walker, layer, block, producer, pruned, aims)
        product = (gradient - at_start) / distance + curvature.ridge(direction)
        curving = (direction * product).sum()
        if not curving > 0:  # no more than rounding
            break
        length = fit / curving
        step += length * direction
        residual -= length * product
        preconditioned = curvature.solve(residual)
        before, fit = fit, (residual * preconditioned).sum()
        direction = preconditioned + fit / before * direction
    producer.put(producer.every, start + step)


def _gradient(
    walker: Walker, layer: nn.Module, block: Block, producer: "_Producer", pruned: Stream, aims: Aims
) -> Tensor:
    """Return the gradient of E||t - y||^2 / 2 with respect to the linear producer's weight, (rows, H) float64."""
    total = torch.zeros_like(producer.weight, dtype=torch.float64)
    for batch in walker.batches(len(pruned)):
        with torch.enable_grad():
            run = walker.run_batch(layer, block, pruned.read(batch))
            missing = aims.of(batch, run.output.device) - run.output
            total += torch.autograd.grad(missing.square().sum() / 2, producer.weight)[0]
    return producer.rows_of(total) / pruned.hidden[..., 0].numel()


class _Producer:
    """The rows of a block's producer that its output is linear in: those of the values, or of the gated projection.

    Attributes:
        module: the projection.
        weight: its weight as it is stored.
        every: all that the block has.
        entries: (rows,) their indices among its outputs, unit by unit.
        rows_per_unit: how many of them a unit has.
    """

    def __init__(self, layer: nn.Module, block: Block) -> None:
        assert block.linear is not None
        self._place, self._part = block.linear
        self._size = block.size
        self.module = layer.get_submodule(self._place.tensor.removesuffix(".weight"))
        self.weight = layer.get_parameter(self._place.tensor)
        self.every = Kept.whole(torch.arange(block.units, device=self.weight.device), block.members)
        self.entries = self._entries(self.every)
        self.rows_per_unit = self._place.parts[self._part].of_unit(block.members)

    @property
    def matrix(self) -> Tensor:
        """The weight (outputs, H), a view where it is stored transposed."""
        return self._outputs_first(self.weight)

    def get(self) -> Tensor:
        """Return a copy of the rows, (rows, H)."""
        return self.rows_of(self.weight.detach())

    def put(self, kept: Kept, rows: Tensor) -> None:
        """Overwrite those of `kept`, (rows, H)."""
        self.matrix[self._entries(kept)] = rows.to(self.weight.dtype)

    def rows_of(self, values: Tensor) -> Tensor:
        """Return the rows out of values of the weight's shape, (rows, H)."""
        return self._outputs_first(values)[self.entries]

    def _entries(self, kept: Kept) -> Tensor:
        return self._place.entries(kept, self._size, self._part)

    def _outputs_first(self, values: Tensor) -> Tensor:
        return values if self._place.dim == 0 else values.T


class _Seen:
    """What passes through the linear producer and the consumer of a block while it is watched."""

    def __init__(self, layer: nn.Module, block: Block, producer: _Producer) -> None:
        self.units, self.producer, self.consumer = block.units, producer, consumer_of(layer, block)
        self.weight = consumer_weight(layer, block)
        double = {"dtype": torch.float64, "device": self.weight.device}
        self.inputs = Moments(producer.matrix.shape[1], device=self.weight.device)
        self.produced = torch.zeros(len(producer.entries), **double)  # type: ignore[call-overload]
        self.consumed = torch.zeros(block.channels, **double)  # type: ignore[call-overload]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Sum the moments of the producer's inputs, and the squares of its outputs and of the consumer's inputs."""

        def produce(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self.inputs.add(args[0].detach())
            self.produced.add_(_squares(output[..., self.producer.entries]))

        def consume(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.consumed.add_(_squares(args[0]))

        handles = (
            self.producer.module.register_forward_hook(produce),
            self.consumer.register_forward_pre_hook(consume),
        )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class _Curvature:
    """D x G in the place of the Hessian: G the Gram matrix of the producer's input, D diagonal, one value for each row.

    A row's value is the squared norm of the consumer's columns that read it, times how much of the row's own square
    comes through to them (the gate's square, or that of the attention weights).
    """

    def __init__(self, seen: _Seen, damping: float) -> None:
        pulls = seen.weight.double().square().sum(0) * seen.consumed
        # The query heads that share a KV head.
        pulls = pulls.view(seen.units, -1, seen.producer.rows_per_unit).sum(1).flatten()
        least = torch.finfo(torch.float64).tiny  # of a row that nothing comes from, whose gradient is zero, too
        rows = pulls / seen.produced.clamp_min(least)
        self._gram = seen.inputs.gram
        self._rows = (rows + damping * rows.mean()).clamp_min(least)[:, None]
        self._factor = cholesky(damped(self._gram, damping))
        self._damping = damping

    def solve(self, gradient: Tensor) -> Tensor:
        """(D x G)^-1 of a gradient (rows, H)."""
        return torch.cholesky_solve((gradient / self._rows).T, self._factor).T

    def ridge(self, direction: Tensor) -> Tensor:
        """The ridge's part of the Hessian, times a direction (rows, H)."""
        return self._damping * self._rows * (direction @ self._gram)


def _squares(values: Tensor) -> Tensor:
    """The sum over all tokens of each channel's square, float64."""
    return values.detach().flatten(0, -2).double().square().sum(0)
