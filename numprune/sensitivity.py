"""How much the loss minds what a block puts out: gradients of the loss, layer by layer from the last to the first.

The calibration text's NLL is summed over a row's tokens and its gradient taken with respect to every block's output y.
To second order, with the empirical Fisher matrix as the Hessian and errors independent between tokens, an error dy of
the block costs the model 1/2 E[(g^T dy)^2] = 1/2 tr(S E[dy dy^T]) nats per token, S = E[g g^T]: what greedy OBS needs
to price its removals in the model's own loss (Hassibi & Stork 1993 have the loss's Hessian where layer-wise methods put
the identity), and what makes the prices of different blocks comparable.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from numprune.anatomy import Block
from numprune.calibration import block_output
from numprune.layers import Layers
from numprune.progress import Progress


@dataclass(frozen=True)
class Sensitivity:
    """Of every block, by its name.

    Attributes:
        output: (H, H), S in nats per token; where the layers put hidden states, since together they are large.
        taylor: where it was asked for, (units,) float64: LLM-Pruner's first-order score (Ma et al. 2023, arXiv
            2305.11627, eq. 5, element-wise), the sum over the unit's parameters in all its matrices of |w dL/dw|, L
            the mean NLL.
    """

    output: Mapping[str, Tensor]
    taylor: Mapping[str, Tensor]


def measure(layers: Layers, rows: Tensor, batch_size: int = 8, *, taylor: bool = False) -> Sensitivity:
    """Return the sensitivities of all blocks over the calibration rows.

    Every layer's input is kept on the way there for the way back. A model in memory is gone through batch by batch.
    Where layers are read from a checkpoint, each is read twice, and its inputs are kept where `layers` puts them.

    Args:
        layers: of the model.
        rows: (N, S) int64 tokens.
        batch_size: rows at a time.
        taylor: also collect the Taylor scores, for which the gradients of the weights are kept.
    """
    anatomy = layers.anatomy
    hidden_size, tokens = anatomy.hidden_size, rows.numel()
    output = {block.name: layers.allocate(hidden_size, hidden_size).zero_() for block in anatomy.blocks}
    gradients: dict[str, dict[str, Tensor]] = {block.name: {} for block in anatomy.blocks} if taylor else {}
    rotary = layers.rotary(rows.shape[1])
    scores: dict[str, Tensor] = {}
    chunks = rows.split(batch_size if layers.resident else len(rows))
    with Progress(2 * anatomy.layers * len(chunks), "gradients", "layer") as bar:
        for number, part in enumerate(chunks):
            batches = [slice(at, at + batch_size) for at in range(0, len(part), batch_size)]
            entering = _forward(layers, part, batches, rotary, bar)
            gradient = _head_gradient(layers, part, entering.pop())
            for index in reversed(range(anatomy.layers)):
                blocks = [block for block in anatomy.of_layer(index) if block.units]
                hidden = entering.pop()
                with layers.layer(index) as layer:
                    for batch in batches:
                        _backward(layer, blocks, hidden, gradient, batch, rotary, output, gradients)
                    if taylor and number == len(chunks) - 1:
                        for block in blocks:
                            scores[block.name] = _taylor(layer, block, gradients.pop(block.name), tokens)
                bar.update()
    return Sensitivity({name: total.div_(tokens) for name, total in output.items()}, scores)


@torch.no_grad()
def _forward(
    layers: Layers, rows: Tensor, batches: list[slice], rotary: tuple[Tensor, Tensor], bar: Progress
) -> list[Tensor]:
    """Return what enters each layer, and what leaves the last."""
    anatomy = layers.anatomy
    entering = [layers.allocate(*rows.shape, anatomy.hidden_size)]
    for batch in batches:
        entering[0][batch] = layers.embed(rows[batch]).to(entering[0].device)
    for index in range(anatomy.layers):
        before, after = entering[-1], layers.allocate(*rows.shape, anatomy.hidden_size)
        with layers.layer(index) as layer:
            for batch in batches:
                hidden = before[batch].to(layers.device)
                for block in anatomy.of_layer(index):
                    if block.units:
                        hidden = hidden + block_output(layer, block, hidden, rotary)
                after[batch] = hidden.to(after.device)
        entering.append(after)
        bar.update()
    return entering


def _head_gradient(layers: Layers, rows: Tensor, hidden: Tensor) -> Tensor:
    """Return the gradient of the summed NLL with respect to what leaves the last layer, written over it."""
    with layers.head() as head:
        for batch in (slice(row, row + 1) for row in range(len(rows))):  # a batch's logits could be the largest tensor
            leaving = hidden[batch].to(layers.device).requires_grad_()
            with torch.enable_grad():
                logits = head.output(head.norm(leaving))[:, :-1].float()
                targets = rows[batch][:, 1:].to(logits.device)
                loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
            (gradient,) = torch.autograd.grad(loss, leaving)
            hidden[batch] = gradient.to(hidden.device)
    return hidden


def _backward(
    layer: nn.Module,
    blocks: list[Block],
    hidden: Tensor,
    gradient: Tensor,
    batch: slice,
    rotary: tuple[Tensor, Tensor],
    output: dict[str, Tensor],
    gradients: dict[str, dict[str, Tensor]],
) -> None:
    """Take `gradient` (N, S, H), of the loss, from what leaves the layer to what enters it, for one batch of rows."""
    behind = gradient[batch].to(rotary[0].device)  # a layer that skips both blocks has no parameters to ask
    matrices = {block.name: _matrices(layer, block) if block.name in gradients else {} for block in blocks}
    with torch.enable_grad():
        states = [hidden[batch].to(behind.device).requires_grad_()]
        for block in blocks:
            states.append(states[-1] + block_output(layer, block, states[-1], rotary))
    for block, before, after in reversed(list(zip(blocks, states, states[1:], strict=False))):
        flat = behind.flatten(0, 1)
        output[block.name] += (flat.T @ flat).to(output[block.name].device)
        behind, *found = torch.autograd.grad(after, [before, *matrices[block.name].values()], behind)
        for name, value in zip(matrices[block.name], found, strict=True):
            sums = gradients[block.name]
            sums[name] = sums[name] + value if name in sums else value
    gradient[batch] = behind.to(gradient.device)


def _matrices(layer: nn.Module, block: Block) -> dict[str, nn.Parameter]:
    """The parameters that go with the block's units, by name; what is computed of them now has gradients."""
    modules = [block.consumer, *(name for name, _ in block.producers)]
    found = {f"{name}.{key}": value for name in modules for key, value in layer.get_submodule(name).named_parameters()}
    found.pop(f"{block.consumer}.bias", None)  # no unit's
    for value in found.values():
        value.requires_grad_()
    return found


def _taylor(layer: nn.Module, block: Block, gradients: dict[str, Tensor], tokens: int) -> Tensor:
    matrices = _matrices(layer, block)
    score = torch.zeros(block.units, dtype=torch.float64, device=next(layer.parameters()).device)
    for name, gradient in gradients.items():
        salience = (matrices[name].detach().double() * gradient.double() / tokens).abs()
        if name.startswith(block.consumer):
            salience = salience.T
        score += salience.reshape(block.units, -1).sum(1)
    return score
