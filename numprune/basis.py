"""Choose which directions of the residual stream a narrower model keeps.

If the directions U (H, k) of the stream x are removed at one point of the model, the loss rises, to second order and
with the Fisher matrix as the Hessian, by about 1/2 tr(U^T C U U^T F U), where C = E[x x^T] and F = E[g g^T] are taken
over tokens and g is the gradient of the loss there. The stream is one and the same from the embedding to the last norm,
so U minimizes the sum of this over all points where something reads it.

`fisher`: U are the k eigenvectors with the smallest eigenvalues of

    tau * sum C / tr(sum C) + sum F / (tau * tr(sum F)),

with the tau of a few at which that sum is smallest (output-aware basis selection, arXiv 2609.35579). `coordinates`: U
are k coordinates, chosen one after another so that the sum rises least. A rotation removes several times less, but it
unties the output matrix from the embedding.

Labels are drawn from the model itself, which makes F the Fisher matrix and needs no labelled text. The first token of a
row is left out: in many models it is an outlier of a thousand times the usual size that would decide everything, and
little is read there.

Sources and pitfalls: Minitron (arXiv 2407.14679) ranks coordinates by the size of norms' outputs; SliceGPT (arXiv
2401.15024) rotates to principal components. Both ignore what the loss is sensitive to.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from numprune.blocks import Block
from numprune.calibration import Walker, check_rows
from numprune.hidden import Basis, Narrowing, norm_of
from numprune.layers import Arguments, Layers
from numprune.moments import require_in_range
from numprune.progress import Progress
from numprune.sensitivity import head_gradient, run_forward
from numprune.tasks.language import drawn_nll

logger = logging.getLogger(__name__)

TAUS = (0.1, 0.3, 1.0, 3.0, 10.0)
FIRST = 1  # position of a row that is measured first


@dataclass(frozen=True)
class StreamMoments:
    """Second moments of the residual stream at every point where it is read.

    Attributes:
        states: C at each point, (H, H), allocated like hidden states.
        gradients: F at each point, per token, (H, H).
    """

    states: list[Tensor]
    gradients: list[Tensor]


def measure(layers: Layers, rows: Tensor, batch_size: int = 8, *, first: int = FIRST, seed: int = 0) -> StreamMoments:
    """Return the moments over calibration rows, in front of every norm that reads the stream, first layer first.

    Args:
        layers: of a causal language model that `hidden.check_narrowable` accepts.
        rows: (N, S) int64 tokens.
        batch_size: rows at a time.
        first: position at which to start in each row.
        seed: of the drawn labels.

    Raises:
        InputError: rows do not fit the model, or hidden states or gradients overflow.
    """
    anatomy = layers.anatomy
    check_rows(anatomy, rows)
    draw = torch.Generator().manual_seed(seed)
    norms = [_norms([block for block in anatomy.of_layer(index) if block.units]) for index in range(anatomy.layers)]
    size, points = anatomy.hidden_size, sum(map(len, norms)) + 1
    states, gradients = ([layers.allocate(size, size).zero_() for _ in range(points)] for _ in range(2))
    walker = Walker(layers, rows.shape[1:], batch_size)

    def add(point: int, hidden: Tensor, gradient: Tensor) -> None:
        for total, values in ((states[point], hidden), (gradients[point], gradient)):
            flat = values.detach()[:, first:].flatten(0, 1).float()
            total += (flat.T @ flat).to(total.device)

    chunks = rows.split(batch_size if layers.resident else len(rows))
    with Progress(2 * anatomy.layers * len(chunks), "basis", "layer") as bar:
        for part in chunks:
            entering = run_forward(walker, part, bar)
            leaving = entering.pop()
            gradient = layers.allocate(*leaving.shape).copy_(leaving)
            head_gradient(layers, part, gradient, lambda logits, _: drawn_nll(logits, draw))
            add(points - 1, leaving, gradient)
            point = points - 1
            for index in reversed(range(anatomy.layers)):
                hidden = entering.pop()
                point -= len(norms[index])
                with layers.layer(index) as layer:
                    for batch in walker.batches(len(part)):
                        call = walker.arguments(batch.stop - batch.start)[index]
                        seen, (before, *own) = _backward(
                            layers, layer, norms[index], call, hidden[batch], gradient[batch]
                        )
                        for offset in range(len(seen)):
                            add(point + offset, seen[offset], own[offset])
                        gradient[batch] = before.to(gradient.device)
                bar.update()
    count = len(rows) * (rows.shape[1] - first)
    for total in (*states, *gradients):
        require_in_range("residual stream", "hidden states or gradients", total.div_(count))
    return StreamMoments(states, gradients)


def _norms(blocks: list[Block]) -> list[str]:
    """Return the norms of a layer that read the stream, in the order of the forward pass."""
    return list(dict.fromkeys(norm_of(blocks, block) for block in blocks))


def _backward(
    layers: Layers, layer: nn.Module, norms: list[str], call: Arguments, hidden: Tensor, gradient: Tensor
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Return the stream (n, S, H) in front of each norm, and the gradients in front of the layer and each norm."""
    seen: list[Tensor] = []
    hooks = [
        layer.get_submodule(name).register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
        for name in norms
    ]
    try:
        with torch.enable_grad():
            before = hidden.to(layers.device).requires_grad_()
            after = call.call(layer, before)
    finally:
        for hook in hooks:
            hook.remove()
    return seen, torch.autograd.grad(after, [before, *seen], gradient.to(after.device))


def choose(moments: StreamMoments, size: int, basis: Basis) -> Narrowing:
    """Return the coordinates, of the rotated stream for `fisher`, that a model of hidden size `size` keeps."""
    if basis == "coordinates":
        return Narrowing(cheapest_coordinates(moments, size))
    rotations = {tau: _rotation(moments, tau) for tau in TAUS}
    losses = {tau: loss(moments, rotation[:, size:]) for tau, rotation in rotations.items()}
    best = min(losses, key=losses.__getitem__)
    logger.info("basis of the residual stream: tau %g of %s", best, _told(losses))
    return Narrowing(torch.arange(size), rotations[best])


def _told(losses: Mapping[float, float]) -> str:
    return ", ".join(f"{tau:g} ({value:.3g} nats)" for tau, value in losses.items())


def _rotation(moments: StreamMoments, tau: float) -> Tensor:
    """Return (H, H) float64, orthogonal, columns from the most to the least worth keeping."""
    states, gradients = (_total(part) for part in (moments.states, moments.gradients))
    return principal_axes(tau * states / states.trace() + gradients / (tau * gradients.trace()))


def principal_axes(moment: Tensor) -> Tensor:
    """Return the eigenvectors of a symmetric matrix (H, H) as columns, largest eigenvalue first, in float64."""
    return torch.linalg.eigh(moment.double()).eigenvectors.flip(1)


def loss(moments: StreamMoments, removed: Tensor) -> float:
    """Return the price of removing the directions (H, k) at every point: 1/2 sum tr(U^T C U U^T F U), in nats."""
    total = 0.0
    for state, gradient in zip(moments.states, moments.gradients, strict=True):
        left, right = (removed.T @ part.to(removed) @ removed for part in (state, gradient))
        total += float((left * right).sum()) / 2  # both are symmetric
    return total


def cheapest_coordinates(moments: StreamMoments, size: int) -> Tensor:
    """Return the (size,) coordinates to keep, ascending: the others are removed one by one where that costs least."""
    pairs = sum(
        state.double() * gradient.double() for state, gradient in zip(moments.states, moments.gradients, strict=True)
    )
    assert isinstance(pairs, Tensor)
    price, kept = pairs.diagonal().clone(), torch.ones(len(pairs), dtype=torch.bool, device=pairs.device)
    for _ in range(len(pairs) - size):
        gone = int(price.argmin())
        kept[gone] = False
        price += 2 * pairs[gone]
        price[gone] = torch.inf
    return kept.nonzero().flatten().cpu()


def _total(parts: list[Tensor]) -> Tensor:
    total = parts[0].double()
    for part in parts[1:]:
        total = total + part.double()
    return total
