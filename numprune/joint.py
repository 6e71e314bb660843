"""Both sides of what is left of a block fitted to its targets: the consumer, and the producer that it reads linearly.

A block's output is linear in its consumer (`o_proj`, `down_proj`), and with the consumer given it is linear in one of
its producers, too: in `v_proj`, since the attention weights do not depend on it, and in `up_proj`, whose output the
gate multiplies. So the kept units' rows of that producer can be fitted to the same targets by least squares. Their
normal equations are too large to be written down, (K H)^2 values, but not to be multiplied with: one forward and one
backward pass of the block. A few steps of conjugate gradients, preconditioned by the Kronecker product of the input's
Gram matrix and a diagonal, do most of it; then the consumer is fitted again. All of it is ridge regression towards the
original weights, as in compensation.py.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from numprune.anatomy import Block
from numprune.calibration import Walker, block_output, consumer_of
from numprune.compensation import refit
from numprune.linalg import cholesky, damped
from numprune.statistics import Moments
from numprune.surgery import channels_of, narrowed, rows_of

STEPS = 4  # on the one model and ratio tried, eight gave about a seventh more of the gain for twice the work


@torch.no_grad()
def refit_both(
    walker: Walker, layer: nn.Module, block: Block, units: Tensor, pruned: Tensor, dense: Tensor, damping: float
) -> None:
    """Overwrite the linear producer's and the consumer's weights of `units` with fitted ones.

    Args:
        walker: of the model.
        layer: the block's decoder layer, the consumer fitted already.
        units: (K,) that are kept, at least one.
        pruned: (N, S, H) the pruned model's residual stream in front of the block.
        dense: (N, S, H) the dense model's behind it: `pruned` and the block's output together should give it.
        damping: relative to the mean of the normal equations' diagonals.
    """
    small = narrowed(layer, block, units)
    left = replace(block, units=len(units))
    _refit_producer(walker, small, left, pruned, dense, damping)
    consumer, producer = consumer_of(small, left), _producer(small, block)
    moments = Moments(left.channels, outputs=consumer.weight.shape[0], device=consumer.weight.device)
    for batch, inputs, output in walker.run(small, left, pruned):
        moments.add(inputs, (dense[batch] - pruned[batch]).to(output.device))
    every = torch.arange(left.channels, device=consumer.weight.device)
    own = None if consumer.bias is None else consumer.bias.double()
    columns, bias = refit(consumer.weight.double(), own, every, moments, damping)
    consumer_of(layer, block).weight[:, channels_of(block, units)] = columns.to(consumer.weight.dtype)
    if bias is not None:
        consumer_of(layer, block).bias.copy_(bias)
    _producer(layer, block).weight[rows_of(block, units, block.producers[-1])] = producer.weight


def _refit_producer(
    walker: Walker, layer: nn.Module, block: Block, pruned: Tensor, dense: Tensor, damping: float
) -> None:
    """Fit W of the linear producer: minimise E||t - y(W)||^2 / 2 + the ridge, y affine in W, from W as it stands."""
    weight = _producer(layer, block).weight
    start = weight.detach().clone()
    seen = _Seen(layer, block)
    with seen.watching():
        at_start = _gradient(walker, layer, block, pruned, dense)
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
        weight.copy_(start + distance * direction)
        product = (_gradient(walker, layer, block, pruned, dense) - at_start) / distance + curvature.ridge(direction)
        curving = (direction * product).sum()
        if not curving > 0:  # no more than rounding
            break
        length = fit / curving
        step += length * direction
        residual -= length * product
        preconditioned = curvature.solve(residual)
        before, fit = fit, (residual * preconditioned).sum()
        direction = preconditioned + fit / before * direction
    weight.copy_(start + step)


def _gradient(walker: Walker, layer: nn.Module, block: Block, pruned: Tensor, dense: Tensor) -> Tensor:
    """Return the gradient of E||t - y||^2 / 2 with respect to the linear producer's weight, (rows, H) float64."""
    weight = _producer(layer, block).weight
    total = torch.zeros_like(weight, dtype=torch.float64)
    for batch in walker.batches(len(pruned)):
        before, behind = (hidden[batch].to(weight.device) for hidden in (pruned, dense))
        with torch.enable_grad():
            missing = behind - before - block_output(layer, block, before, walker.rotary)
            total += torch.autograd.grad(missing.square().sum() / 2, weight)[0]
    return total / (pruned.shape[0] * pruned.shape[1])


class _Seen:
    """What passes through the linear producer and the consumer of a block while it is watched."""

    def __init__(self, layer: nn.Module, block: Block) -> None:
        self.block, self.producer, self.consumer = block, _producer(layer, block), consumer_of(layer, block)
        double = {"dtype": torch.float64, "device": self.producer.weight.device}
        self.inputs = Moments(self.producer.in_features, device=self.producer.weight.device)
        self.produced = torch.zeros(self.producer.out_features, **double)  # type: ignore[call-overload]
        self.consumed = torch.zeros(self.consumer.in_features, **double)  # type: ignore[call-overload]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Sum the moments of the producer's inputs, and the squares of its outputs and of the consumer's inputs."""

        def produce(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self.inputs.add(args[0].detach())
            self.produced.add_(_squares(output))

        def consume(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.consumed.add_(_squares(args[0]))

        handles = (self.producer.register_forward_hook(produce), self.consumer.register_forward_pre_hook(consume))
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
        pulls = seen.consumer.weight.double().square().sum(0) * seen.consumed
        rows_per_unit = seen.block.producers[-1][1]
        pulls = pulls.view(seen.block.units, -1, rows_per_unit).sum(1).flatten()  # the query heads that share a KV head
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
    return values.detach().flatten(0, 1).double().square().sum(0)


def _producer(layer: nn.Module, block: Block) -> nn.Linear:
    module = layer.get_submodule(block.producers[-1][0])
    assert isinstance(module, nn.Linear)
    return module
