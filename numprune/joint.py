"""Fit the producer in which a block's output is linear to the block's targets, after the consumer.

A block's output is linear in its consumer. With the consumer fixed, it is also linear in one of its producers: the
value projection, because the attention weights do not depend on it, or the projection whose output an MLP's gate
multiplies. So once the consumer is fitted, the kept units' rows of that producer can be fitted to the same targets by
least squares. The values are fitted only if the layer's MLP has no gate: beside a fitted MLP, their fit took as long
and gained nothing (embedded model, 20 and 30 %).

The normal equations, with (K H)^2 values, are too large to form, but multiplying with them is cheap: the block is run
forward and backward with h V^T in place of the producer's output, where V is the direction and h the producer's input.
Two steps of conjugate gradients, preconditioned by the Kronecker product of a diagonal and the input's Gram matrix,
achieve most of the gain. The ridge penalizes the distance to the original weights, as in compensation.py.

On MLPs of SmolLM2-135M with 6,144 tokens, two steps brought other text as close to the targets as four steps and a
second fit of the consumer, which overfitted with a small ridge. The gradient needs every token; the length of the last
step is a single number, for which every fourth row is enough.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from numprune.blocks import Anatomy, Block
from numprune.calibration import Stream, Walker, by_token, consumer_of, consumer_weight
from numprune.layers import replaced
from numprune.linalg import cholesky, damped
from numprune.moments import Moments
from numprune.slices import Kept
from numprune.surgery import narrowed

STEPS = 2
_SEARCH = 4  # every fourth row determines the length of the last step,
_ENOUGH = 32  # but at least this many rows: a quarter of a few can miss two thirds of the curvature
_HEAVIER = 10.0  # the ridge, relative to the consumer's: with less, two steps gained less on other text
_HEAVIEST = 1.0  # with more, two steps gain little
_LIGHTER = 0.1  # the preconditioner's damping, relative to the ridge

Consumed = Callable[[slice], Tensor]  # rows -> the consumer's inputs of the kept channels, (n, S, K), on its device


@dataclass(frozen=True)
class Aims:
    """The desired output of a block: (goal - start) / scale, all (N, S, H); without `start`, the goal itself."""

    goal: Tensor
    start: Tensor | None = None
    scale: float = 1.0

    def of(self, batch: slice, device: torch.device) -> Tensor:
        """Return the desired output for a batch of rows, (n, S, H)."""
        aim = self.goal[batch] if self.start is None else self.goal[batch] - self.start[batch]
        return aim.to(device) / self.scale


def fits_producer(anatomy: Anatomy, block: Block) -> bool:
    """Return whether `joint` fits a producer of the block: of a gated MLP, or the values if there is none."""
    gated = any(other.kind == "mlp" and other.linear and other.units for other in anatomy.of_layer(block.layer))
    return block.linear is not None and (block.kind == "mlp" or not gated)


@torch.no_grad()
def refit_producer(
    walker: Walker,
    layer: nn.Module,
    block: Block,
    kept: Kept,
    pruned: Stream,
    consumed: Consumed,
    aims: Aims,
    damping: float,
) -> nn.Module:
    """Overwrite the kept part of the linear producer's weight with a fitted one; return the layer narrowed to it.

    Args:
        walker: of the model.
        layer: the block's decoder layer, the consumer fitted already.
        block: with a linear producer.
        kept: of the block, at least one unit.
        pruned: the pruned model's residual stream in front of the block.
        consumed: the consumer's inputs there.
        aims: the desired outputs of the block there.
        damping: of the consumer's fit.
    """
    small, left = narrowed(layer, block, kept), block.resized(kept.size)
    producer = _Producer(small, left)
    fit = _Fit(walker, small, left, producer, pruned)
    descent, inputs = fit.start(consumed, aims)
    curvature = _Curvature(producer, inputs, fit.pulls, min(_HEAVIER * damping, _HEAVIEST))
    fitted = producer.get() + _conjugate_gradients(fit, descent, curvature)
    producer.put(producer.every, fitted)
    _Producer(layer, block).put(kept, fitted)
    return small


def _conjugate_gradients(fit: "_Fit", descent: Tensor, curvature: "_Curvature") -> Tensor:
    """Return the change of the producer's rows (rows, H) after STEPS steps; `descent` is the negative gradient."""
    change = torch.zeros_like(descent)
    residual = descent.clone()
    direction = preconditioned = curvature.solve(residual)
    gain = (residual * preconditioned).sum()
    for step in range(STEPS):
        if not gain > 0:  # nothing left to gain
            break
        last = step == STEPS - 1
        ridge = curvature.ridge(direction)
        product = ridge if last else fit.product(direction) + ridge
        curving = (direction * product).sum() + (fit.curving(direction) if last else 0)
        if not curving > 0:  # no more than rounding
            break
        length = gain / curving
        change += length * direction
        if last:
            break
        residual -= length * product
        preconditioned = curvature.solve(residual)
        before, gain = gain, (residual * preconditioned).sum()
        direction = preconditioned + gain / before * direction
    return change


class _Fit:
    """Minimise E||t - y||^2 / 2, y affine in the rows of the linear producer.

    Attributes:
        pulls: after `start`, (channels,) float64: the squared norm of the consumer's column times the mean square of
            its input.
    """

    def __init__(self, walker: Walker, layer: nn.Module, block: Block, producer: "_Producer", pruned: Stream) -> None:
        self._walker, self._layer, self._block = walker, layer, block
        self._producer, self._pruned = producer, pruned
        self._processes = walker.layers.processes
        self._tokens = 0  # of all processes
        self._consumer = consumer_weight(layer, block)
        self._bias = consumer_of(layer, block).bias
        self.pulls = torch.zeros(block.channels, dtype=torch.float64, device=self._consumer.device)

    def start(self, consumed: Consumed, aims: Aims) -> tuple[Tensor, Moments]:
        """Return the negative gradient (rows, H) float64 at the current weights, and the moments of h."""
        inputs = Moments(self._producer.matrix.shape[1], device=self._consumer.device)
        total = self._producer.zeros()
        for batch in self._walker.batches(len(self._pruned)):
            x = consumed(batch)
            self.pulls += x.flatten(0, -2).double().square().sum(0)
            missing = aims.of(batch, x.device) - functional.linear(x, self._consumer, self._bias)
            h, back = self._back(self._pruned.read(batch), None, missing)
            inputs.add(h)
            total += back.T @ h
        inputs.add_up(self._processes)
        self._processes.add_up(self.pulls, total)
        self._tokens = inputs.count
        self.pulls *= self._consumer.double().square().sum(0) / inputs.count
        return total / inputs.count, inputs

    def product(self, direction: Tensor) -> Tensor:
        """Return the Hessian's product with a direction (rows, H), float64."""
        total = self._producer.zeros()
        for batch in self._walker.batches(len(self._pruned)):
            h, back = self._back(self._pruned.read(batch), direction, None)
            total += back.T @ h
        self._processes.add_up(total)
        return total / self._tokens

    def curving(self, direction: Tensor) -> Tensor:
        """Return the curvature along the direction over some rows, see `_SEARCH`."""
        length = self._pruned.hidden.shape[1]
        every = self._tokens // length  # rows, those of other processes included
        step = min(_SEARCH, max(1, every // _ENOUGH))
        rows = self._pruned.read(slice(None))[-self._pruned.first % step :: step]
        total = direction.new_zeros(())
        for batch in self._walker.batches(len(rows)):
            _, _, x = self._through(rows[batch], direction)
            total += functional.linear(x, self._consumer).double().square().sum()
        self._processes.add_up(total)
        return total / (-(-every // step) * length)

    def _back(self, hidden: Tensor, direction: Tensor | None, output: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return h (tokens, H), and at v = h V^T the gradient (tokens, rows) of output . y, by default of y . y / 2."""
        with torch.enable_grad():
            h, v, x = self._through(hidden, direction)
        if output is None:
            output = functional.linear(x.detach(), self._consumer)
        (back,) = torch.autograd.grad(x, v, output @ self._consumer)
        h, back = (by_token(self._layer, self._block, value, len(hidden)) for value in (h, back))
        return h.flatten(0, -2), back.flatten(0, -2)

    def _through(self, hidden: Tensor, direction: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Run the block on `hidden` (n, S, H) with v = h V^T, V the direction or zero, as the producer's output.

        Returns:
            h (..., H), v (..., rows) and the consumer's inputs (n, S, D).
        """
        seen: list[tuple[Tensor, Tensor]] = []
        producer = self._producer
        run = producer.module.forward

        def forward(h: Tensor) -> Tensor:
            h = h.detach()
            if direction is None:
                v = h.new_zeros(*h.shape[:-1], len(producer.entries))
            else:
                v = functional.linear(h, direction.to(h.dtype))
            v.requires_grad_(torch.is_grad_enabled())
            seen.append((h, v))
            return v if producer.is_whole else run(h).detach().index_copy(-1, producer.entries, v)

        with replaced([producer.module], forward):
            x = self._walker.inputs_batch(self._layer, self._block, hidden)
        return *seen.pop(), x


class _Producer:
    """The producer's rows in which a block's output is linear: those of the values, or of the gated projection.

    Attributes:
        module: the projection.
        weight: its weight as stored.
        every: all units of the block.
        entries: (rows,) their indices among its outputs, unit by unit.
        rows_per_unit: rows per unit.
        is_whole: the projection has no other rows.
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
        self.is_whole = len(self.entries) == self.matrix.shape[0]

    @property
    def bias(self) -> Tensor | None:
        """Bias of the rows, (rows,)."""
        bias = self.module.bias
        return None if bias is None else cast(Tensor, bias).detach()[self.entries]

    @property
    def matrix(self) -> Tensor:
        """Return the weight (outputs, H), a view if it is stored transposed."""
        return self._outputs_first(self.weight)

    def get(self) -> Tensor:
        """Return a copy of the rows, (rows, H)."""
        return self._outputs_first(self.weight.detach())[self.entries]

    def zeros(self) -> Tensor:
        """Return zeros for all rows, (rows, H) float64."""
        return self.matrix.new_zeros(len(self.entries), self.matrix.shape[1], dtype=torch.float64)

    def put(self, kept: Kept, rows: Tensor) -> None:
        """Overwrite the rows of `kept`, (rows, H)."""
        self.matrix[self._entries(kept)] = rows.to(self.weight.dtype)

    def _entries(self, kept: Kept) -> Tensor:
        return self._place.entries(kept, self._size, self._part)

    def _outputs_first(self, values: Tensor) -> Tensor:
        return values if self._place.dim == 0 else values.T


class _Curvature:
    """Approximates the Hessian by D x G: G the Gram matrix of the producer's input, D diagonal, one value per row.

    A row's value is the squared norm of the consumer's columns that read it, times the share of the row's square that
    reaches them (the square of the gate, or of the attention weights).

    Args:
        producer: before it is fitted.
        inputs: moments of its inputs.
        pulls: as in `_Fit`.
        damping: of the ridge, relative to D x G.
    """

    def __init__(self, producer: _Producer, inputs: Moments, pulls: Tensor, damping: float) -> None:
        self._gram = inputs.gram
        rows = producer.get().double()
        produced = (rows @ self._gram * rows).sum(1)  # the mean squares of the rows' outputs
        if producer.bias is not None:
            bias = producer.bias.double()
            produced += bias * (2 * rows @ inputs.mean + bias)
        # Query heads share the rows of their KV head.
        pulls = pulls.view(len(rows) // producer.rows_per_unit, -1, producer.rows_per_unit).sum(1).flatten()
        least = torch.finfo(torch.float64).tiny  # of a row without effect, whose gradient is zero, too
        values = pulls / produced.clamp_min(least)
        self._damping = damping
        self._rows = (values + _LIGHTER * damping * values.mean()).clamp_min(least)[:, None]
        self._factor = cholesky(damped(self._gram, _LIGHTER * damping))

    def solve(self, gradient: Tensor) -> Tensor:
        """Apply (D x G)^-1 to a gradient (rows, H)."""
        return torch.cholesky_solve((gradient / self._rows).T, self._factor).T

    def ridge(self, direction: Tensor) -> Tensor:
        """Multiply a direction (rows, H) by the ridge's part of the Hessian."""
        return self._damping * self._rows * (direction @ self._gram)
