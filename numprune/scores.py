"""Fewer dimensions of queries and keys, where a model computes nothing from them but their products.

A head's scores are q . k for all pairs of tokens of a row. Its d dimensions are replaced by fewer, combinations of the
head's own, such that the scores change least in the mean square (CORP, arXiv 2602.05243, fits them by ridge regression
to the dense model's): with Q = E[q q^T], K the covariance of keys within a row, and pairs of tokens taken as
independent, E(q^T k - q^T X k)^2 = ||Q^1/2 (I - X) K^1/2||^2, and the best X of rank r is given by the first r singular
values of Q^1/2 K^1/2 = U S V^T. Keys are centred because softmax ignores what is equal for all keys of a query.

A number of dimensions is priced like units (curves.py): by the error dy that the block's output has with it after a
refit of the consumer, which is run and not derived from the scores. Softmax and values determine what an error of the
scores does, and the loss's gradient at the scores, tried first, priced large changes of confident models too low.

Notation: h heads, d dimensions, r of them kept.
"""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from numprune.blocks import Block
from numprune.calibration import Walker, consumer_weight
from numprune.linalg import damped, spd_solve
from numprune.processes import Processes
from numprune.slices import Size

_DAMPING = 1e-4  # of the refit in prices, as in greedy OBS


@dataclass
class ScoreMoments:
    """Sums over the tokens of two models, the pruned and the dense one, or twice of the dense one; float64.

    Attributes:
        own_queries, own_keys: (h, d, d), of the pruned model with itself; keys are centred in each row.
        queries, keys: (h, d, d), of the pruned model with the dense one.
    """

    own_queries: Tensor
    own_keys: Tensor
    queries: Tensor
    keys: Tensor
    count: int = field(default=0)

    @classmethod
    def empty(cls, heads: int, dims: int, device: torch.device) -> "ScoreMoments":
        zeros = torch.zeros(4, heads, dims, dims, dtype=torch.float64, device=device)
        return cls(zeros[0], zeros[1], zeros[2], zeros[3])

    def add(self, own: tuple[Tensor, Tensor], dense: tuple[Tensor, Tensor]) -> None:
        """Add queries and keys of some rows, each (n, S, h, d)."""
        (query, key), (dense_query, dense_key) = ((one.double() for one in pair) for pair in (own, dense))
        key, dense_key = (one - one.mean(1, keepdim=True) for one in (key, dense_key))
        self.own_queries += torch.einsum("nshd,nshe->hde", query, query)
        self.own_keys += torch.einsum("nshd,nshe->hde", key, key)
        self.queries += torch.einsum("nshd,nshe->hde", query, dense_query)
        self.keys += torch.einsum("nshd,nshe->hde", key, dense_key)
        self.count += query.shape[0] * query.shape[1]

    def add_up(self, processes: Processes) -> None:
        """Add everything that the other processes have added to theirs. Raises ProcessError."""
        count = torch.tensor(self.count)
        processes.add_up(self.own_queries, self.own_keys, self.queries, self.keys, count)
        self.count = int(count)


@dataclass(frozen=True)
class Directions:
    """The directions of a block's scores, by their share in them: the score of two tokens is sum_r (A q)_r (B k)_r.

    Attributes:
        queries, keys: A and B, (h, d, d); row r is direction r.
    """

    queries: Tensor
    keys: Tensor

    @classmethod
    def of(cls, moments: ScoreMoments, damping: float) -> "Directions":
        """Return the directions whose scores are nearest to the dense model's, the largest first.

        With q = M q~ the best linear map of the pruned model's queries to the dense one's, by a ridge around the
        identity, and likewise for keys, the product to approximate is q~^T M^T N k~. `damping`: of the ridge.
        """
        maps, roots, inverses = [], [], []
        for own, other in ((moments.own_queries, moments.queries), (moments.own_keys, moments.keys)):
            for_each = zip(own / moments.count, other / moments.count, strict=True)
            maps.append(torch.stack([_ridge(mine, mine_theirs, damping) for mine, mine_theirs in for_each]))
            root, inverse = _square_roots(own / moments.count)
            roots.append(root)
            inverses.append(inverse)
        product = roots[0] @ maps[0] @ maps[1].mT @ roots[1]
        left, values, right = torch.linalg.svd(product)
        share = values.sqrt()[..., None]
        return cls(share * (left.mT @ inverses[0]), share * (right @ inverses[1]))


def _ridge(own: Tensor, other: Tensor, damping: float) -> Tensor:
    """Return X (d, d) that minimizes E||y - X^T x||^2 + g ||X - I||^2, given E[x x^T] and E[x y^T]."""
    change = spd_solve(damped(own, damping), other - own)
    return change + torch.eye(len(own)).to(change)


def _square_roots(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Return the square roots of (h, d, d) and their inverses; directions without variance are left out of both."""
    values, vectors = torch.linalg.eigh(matrices)
    large = values > values.amax(-1, keepdim=True) * matrices.shape[-1] * torch.finfo(values.dtype).eps
    root = torch.where(large, values, 0).sqrt()
    inverse = torch.where(large, root.where(large, 1).reciprocal(), 0)
    return (vectors * root[..., None, :]) @ vectors.mT, (vectors * inverse[..., None, :]) @ vectors.mT


@contextmanager
def watched(layer: nn.Module, block: Block) -> Iterator[list[Tensor]]:
    """Give the queries and keys, each (n, S, h * d), once the layer has run."""
    assert block.scores is not None
    seen: list[Tensor] = []
    hooks = [
        layer.get_submodule(path).register_forward_hook(lambda _module, _inputs, output: seen.append(output))
        for path in block.scores
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def of_run(walker: Walker, layer: nn.Module, block: Block, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Return the queries and keys of a block on `hidden` (n, S, H), each (n, S, h, d)."""
    with watched(layer, block) as seen:
        walker.inputs_batch(layer, block, hidden)
    query, key = (one.unflatten(-1, (block.units, block.members)) for one in seen)
    return query, key


def unreduced(layer: nn.Module, block: Block) -> nn.Module:
    """Return a layer with copies of the parameters that `reduce` changes; it shares all others with `layer`."""
    assert block.scores is not None
    changed = {id(one) for path in block.scores for one in layer.get_submodule(path).parameters()}
    return copy.deepcopy(layer, {id(one): one for one in layer.parameters() if id(one) not in changed})


@torch.no_grad()
def reduce(layer: nn.Module, block: Block, kept: int, directions: Directions) -> None:
    """Make the first `kept` dimensions of each head its first directions, in place; the others become zero."""
    assert block.scores is not None
    for path, rows in zip(block.scores, (directions.queries, directions.keys), strict=True):
        for _, parameter in layer.get_submodule(path).named_parameters():
            by_head = parameter.view(block.units, block.members, -1)
            fitted = rows[:, :kept] @ by_head.double()
            by_head.zero_()
            by_head[:, :kept] = fitted.to(parameter.dtype)


@torch.no_grad()
def errors_of_dims(
    walker: Walker, layer: nn.Module, block: Block, hidden: Tensor, dims: Iterable[int]
) -> dict[int, Tensor]:
    """Return what is left of the error of a block's output after a refit of its consumer: E[dy dy^T] (out, out).

    Args:
        hidden: (N, S, H), input of the block in the dense model, of this process's rows.
        dims: numbers of kept dimensions.

    Returns:
        By number of dimensions, float64.
    """
    batches, processes = [*walker.batches(len(hidden))], walker.layers.processes
    found = ScoreMoments.empty(*block.size, consumer_weight(layer, block).device)
    for batch in batches:
        own = of_run(walker, layer, block, hidden[batch])
        found.add(own, own)
    found.add_up(processes)
    directions = Directions.of(found, damping=0.0)
    weight = consumer_weight(layer, block)
    reduced = {kept: unreduced(layer, block) for kept in dims}
    for kept, small in reduced.items():
        reduce(small, block, kept, directions)
    inputs, width = weight.shape[1], sum(weight.shape)
    sums = {kept: weight.new_zeros(width, width, dtype=torch.float64) for kept in reduced}
    means = {kept: weight.new_zeros(width, dtype=torch.float64) for kept in reduced}
    for batch in batches:
        output = walker.inputs_batch(layer, block, hidden[batch]) @ weight.T
        for kept, small in reduced.items():
            both = torch.cat([walker.inputs_batch(small, block, hidden[batch]), output], -1).flatten(0, -2).double()
            sums[kept] += both.T @ both
            means[kept] += both.sum(0)
    count = torch.tensor(hidden[..., 0].numel())
    processes.add_up(*sums.values(), *means.values(), count)
    errors = {}
    for kept, total in sums.items():
        mean = means[kept] / int(count)
        moments = total / int(count) - torch.outer(mean, mean)  # the consumer has a bias
        gram, cross = damped(moments[:inputs, :inputs], _DAMPING), moments[:inputs, inputs:]
        errors[kept] = moments[inputs:, inputs:] - cross.T @ spd_solve(gram, cross)
    return errors


def is_reduced(block: Block, size: Size) -> bool:
    """Return whether the block, at this size, has fewer dimensions of queries and keys."""
    return block.scores is not None and size.units > 0 and size.members < block.members
