"""Sensitivity of the loss to block outputs: gradients of the loss, layer by layer from the last to the first.

The task's loss (for a causal model, the NLL of the text) is summed over the rows, and its gradient g is taken with
respect to every block's output y at every token. To second order, with the empirical Fisher matrix as the Hessian and
errors independent between tokens, an error dy of the block costs 1/2 tr(S E[dy dy^T]) per loss, S = sum of g g^T over
all tokens / number of losses (for a causal model, the tokens). Greedy OBS uses S to price removals in the model's own
loss (Hassibi & Stork 1993 use the loss's Hessian where layer-wise methods use the identity), which makes the prices of
different blocks comparable.

If a row has a single loss, with all its tokens pooled, the gradients at its tokens point in similar directions, and so
may a block's errors. Then g is summed over a row's tokens first: S prices an error that is the same at all of them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from numprune.blocks import Block
from numprune.calibration import Walker, consumer_of
from numprune.layers import Arguments, Layers, device_of
from numprune.members import by_member
from numprune.moments import require_in_range
from numprune.progress import Progress


@dataclass(frozen=True)
class Sensitivity:
    """The sensitivities of every block, by name.

    Attributes:
        output: (H, H), S in the unit of the task's loss; allocated like hidden states, because together they are large.
        taylor: if requested, (units, members) float64: LLM-Pruner's first-order score (Ma et al. 2023, arXiv
            2305.11627, eq. 5, element-wise), the sum over the unit's parameters in all its matrices of |w dL/dw|, L the
            mean loss. Parameters shared by members are divided equally among them.
    """

    output: Mapping[str, Tensor]
    taylor: Mapping[str, Tensor]


def measure(layers: Layers, rows: Tensor, batch_size: int = 8, *, taylor: bool = False) -> Sensitivity:
    """Return the sensitivities of all blocks over the calibration rows.

    The forward pass stores every layer's input for the backward pass. A model in memory is processed batch by batch. If
    layers are read from a checkpoint, each is read twice, and its inputs are stored where `layers` allocates them.

    Args:
        layers: of the model.
        rows: (N, S) int64 tokens.
        batch_size: rows at a time.
        taylor: also collect the Taylor scores, for which the gradients of the weights are kept.

    Raises:
        InputError: hidden states or gradients overflow; names the module.
    """
    anatomy = layers.anatomy
    losses = layers.task.losses_in(rows)
    draw = torch.Generator().manual_seed(0)
    output = {
        block.name: layers.allocate(block.hidden_size, block.hidden_size, near=block.layer).zero_()
        for block in anatomy.blocks
    }
    gradients: dict[str, dict[str, Tensor]] = {block.name: {} for block in anatomy.blocks} if taylor else {}
    walker = Walker(layers, rows.shape[1:], batch_size)
    scores: dict[str, Tensor] = {}
    share = walker.share(len(rows))
    layers.task.skip(rows[: share.start], anatomy.hidden_size, draw)
    mine = rows[share]
    chunks = mine.split(batch_size if layers.resident else len(mine)) if len(mine) else ()
    with Progress(2 * anatomy.layers * len(chunks), "gradients", "layer") as bar:
        for number, part in enumerate(chunks):
            batches = list(walker.batches(len(part)))
            entering = run_forward(walker, part, bar)
            gradient = head_gradient(layers, part, entering.pop(), partial(layers.task.loss, draw=draw))
            for index in reversed(range(anatomy.layers)):
                blocks = [block for block in anatomy.of_layer(index) if block.units]
                hidden = entering.pop()
                entered = hidden if index in anatomy.mergings else gradient  # of the shape of what enters the layer
                with layers.layer(index) as layer:
                    for batch in batches:
                        call = walker.arguments(batch.stop - batch.start)[index]
                        _backward(layers, layer, blocks, call, hidden, gradient, entered, batch, output, gradients)
                    gradient = entered
                    if taylor and number == len(chunks) - 1:
                        for block in blocks:
                            layers.processes.add_up(*gradients[block.name].values())
                            scores[block.name] = _taylor(layer, block, gradients.pop(block.name), losses)
                bar.update()
    layers.processes.add_up(*output.values())
    for block in reversed(anatomy.blocks):  # in the order found
        require_in_range(f"{block.path}.{block.consumer}", "gradients", output[block.name].div_(losses))
    return Sensitivity(output, scores)


@torch.no_grad()
def run_forward(walker: Walker, rows: Tensor, bar: Progress) -> list[Tensor]:
    """Return what each layer reads, before tokens are merged, and the output of the last.

    Raises InputError if hidden states overflow.
    """
    layers = walker.layers
    entering = [walker.embed(rows).hidden]
    for index in range(layers.anatomy.layers):
        before = walker.merged(index, entering[-1])
        after = layers.allocate(*before.shape)
        with layers.layer(index) as layer:
            walker.through(layer, index, before, after)
        require_in_range(layers.anatomy.layer_paths[index], "hidden states", after)
        entering.append(after)
        bar.update()
    return entering


def head_gradient(layers: Layers, rows: Tensor, hidden: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Return the gradient of the summed loss with respect to the last layer's output, overwriting it.

    `loss`: of the task's output and the rows.
    """
    with layers.head() as head:
        for batch in (slice(row, row + 1) for row in range(len(rows))):  # a batch's logits could be the largest tensor
            leaving = hidden[batch].to(layers.device).requires_grad_()
            with torch.enable_grad():
                total = loss(head(rows[batch], leaving), rows[batch])
            (gradient,) = torch.autograd.grad(total, leaving)
            hidden[batch] = gradient.to(hidden.device)
    return hidden


def _backward(
    layers: Layers,
    layer: nn.Module,
    blocks: list[Block],
    call: Arguments,
    hidden: Tensor,
    gradient: Tensor,
    entered: Tensor,
    batch: slice,
    output: dict[str, Tensor],
    gradients: dict[str, dict[str, Tensor]],
) -> None:
    """Propagate `gradient` (N, S, H) of the loss from the layer's output to its input, for one batch of rows.

    It is written into `entered`, which may be `gradient` or `hidden`.

    The blocks' outputs are their consumers', before any norm between them and the residual stream.
    """
    matrices = {block.name: _matrices(layer, block) if block.name in gradients else {} for block in blocks}
    seen: list[Tensor] = []
    hooks = [
        consumer_of(layer, block).register_forward_hook(lambda _module, _inputs, value: seen.append(value))
        for block in blocks
    ]
    try:
        with torch.enable_grad():
            before = hidden[batch].to(device_of(layer, layers.device)).requires_grad_()
            after = call.call(layer, call.merged(before))
    finally:
        for hook in hooks:
            hook.remove()
    behind = gradient[batch].to(after.device)
    wanted = [before, *seen, *(value for block in blocks for value in matrices[block.name].values())]
    entering, *rest = torch.autograd.grad(after, wanted, behind)
    found = iter(rest)
    for block in blocks:
        flat = next(found)
        flat = flat.reshape(len(before), -1, flat.shape[-1])  # some models flatten their rows, or divide them
        flat = flat.sum(1) if layers.task.pooled else flat.flatten(0, 1)
        output[block.name] += (flat.T @ flat).to(output[block.name].device)
    for block in blocks:
        sums = gradients.get(block.name, {})
        for name in matrices[block.name]:
            value = next(found)
            sums[name] = sums[name] + value if name in sums else value
    entered[batch] = entering.to(entered.device)  # last: a gradient that passed a sum unchanged is `gradient` itself


def _matrices(layer: nn.Module, block: Block) -> dict[str, Tensor]:
    """Enable gradients of the parameters of the block's units, and return them by name."""
    return {part.tensor: layer.get_parameter(part.tensor).requires_grad_() for part in block.slices}


def _taylor(layer: nn.Module, block: Block, gradients: dict[str, Tensor], losses: int) -> Tensor:
    matrices = _matrices(layer, block)

    def salience(name: str) -> Tensor:
        return (matrices[name].detach().double() * gradients[name].double() / losses).abs()

    return by_member(block, salience, matrices[block.reader.tensor].device)
