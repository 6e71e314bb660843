"""Choose which directions of the residual stream a narrower model keeps.

Let x be the stream at a point where a norm reads it, divided by its root mean square, and g the gradient of the loss
with respect to that. With the Fisher matrix F = E[g g^T] as the Hessian, an error e of x raises the loss by about
1/2 tr(F E[e e^T]).

`fisher`: the matrices that read the stream are refitted, so that the part of x which the kept directions K (H, K)
predict is not lost. With F = L L^T and C = E[x x^T], both summed over all points, the loss rises least if K^T x are the
principal components of L^T x: K = L W, where W are the eigenvectors of L^T C L with the largest eigenvalues. A rotation
with the same span gives the same model. So this is PCA of the stream in the metric of the loss; PCA itself (SliceGPT,
arXiv 2401.15024) takes F = I.

`coordinates`: those are removed, one after another, whose removal raises 1/2 tr(U^T C U U^T F U) least, U the unit
vectors of all removed ones, summed over the points. A rotation loses less, but unties the output matrix.

Labels are drawn from the model itself, which makes F the Fisher matrix and needs no labelled text. The first token of a
row is left out: in many models it is an outlier of a thousand times the usual size, and little is read there.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from numprune.blocks import Block
from numprune.calibration import Walker, check_rows
from numprune.hidden import Basis, Narrowing, norm_of
from numprune.layers import Arguments, Layers, device_of
from numprune.linalg import cholesky, damped
from numprune.moments import require_in_range
from numprune.progress import Progress
from numprune.sensitivity import head_gradient, run_forward
from numprune.tasks.language import drawn_nll, skip_labels

FIRST = 1  # position of a row that is measured first
_DAMPING = 1e-4  # of the Fisher matrix, relative to its mean diagonal: directions without gradients are ranked by size


@dataclass(frozen=True)
class StreamMoments:
    """Second moments of the residual stream, divided by its root mean square, at every point where it is read.

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
    size, where = anatomy.hidden_size, [*(index for index, own in enumerate(norms) for _ in own), None]  # None: behind
    points = len(where)
    states, gradients = ([layers.allocate(size, size, near=layer).zero_() for layer in where] for _ in range(2))
    walker = Walker(layers, rows.shape[1:], batch_size)

    def add(point: int, hidden: Tensor, gradient: Tensor) -> None:
        hidden, gradient = (values.detach()[:, first:].flatten(0, 1).float() for values in (hidden, gradient))
        scale = hidden.square().mean(-1, keepdim=True).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
        for total, values in ((states[point], hidden / scale), (gradients[point], gradient * scale)):
            total += (values.T @ values).to(total.device)

    share = walker.share(len(rows))
    mine = rows[share]
    skip_labels(share.start * rows.shape[1], draw)  # of the processes before this one
    chunks = mine.split(batch_size if layers.resident else len(mine)) if len(mine) else ()
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
    layers.processes.add_up(*states, *gradients)
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
            before = hidden.to(device_of(layer, layers.device)).requires_grad_()
            after = call.call(layer, before)
    finally:
        for hook in hooks:
            hook.remove()
    return seen, torch.autograd.grad(after, [before, *seen], gradient.to(after.device))


def choose(moments: StreamMoments, size: int, basis: Basis) -> Narrowing:
    """Return the coordinates, of the rotated stream for `fisher`, that a model of hidden size `size` keeps."""
    if basis == "coordinates":
        return Narrowing(cheapest_coordinates(moments, size))
    factor = cholesky(damped(_total(moments.gradients), _DAMPING))
    components = factor @ principal_axes(factor.T @ _total(moments.states) @ factor)
    return Narrowing(torch.arange(size), torch.linalg.qr(components).Q)


def principal_axes(moment: Tensor) -> Tensor:
    """Return the eigenvectors of a symmetric matrix (H, H) as columns, largest eigenvalue first, in float64."""
    return torch.linalg.eigh(moment.double()).eigenvectors.flip(1)


def cheapest_coordinates(moments: StreamMoments, size: int) -> Tensor:
    """Return the (size,) coordinates to keep, ascending: the others are removed one by one where that costs least."""
    both = zip(moments.states, moments.gradients, strict=True)
    pairs = _total([state.double() * gradient.double() for state, gradient in both])
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
        total = total + part.to(total.device).double()
    return total
