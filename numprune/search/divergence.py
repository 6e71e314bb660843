"""The divergence of plans' predictions from the dense model's."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from numprune.calibration import Walker
from numprune.layers import Head
from numprune.search.levels import Levels
from numprune.slices import Size
from numprune.tasks import CAUSAL
from numprune.tasks.language import bucketed, kl_divergence

# Of larger vocabularies, only the dense model's most probable tokens at each position are compared, and all others as
# one: 64 rows of 512 tokens take 0.2 GB, with a vocabulary of 128,256 in full they would take 17 GB.
TOP_K = 512
_WHOLE = 8 * TOP_K


class Divergences:
    """The divergence of the predictions of plans on some rows: KL(dense || plan), or the task's own.

    All plans pass through a layer before the next one is read. Of a causal language model, the dense model's
    log-probabilities are stored; of other tasks, its last hidden states.

    Args:
        walker: of the dense model.
        rows: (N, S) int64 tokens.
        levels: of its blocks.
    """

    def __init__(self, walker: Walker, rows: Tensor, levels: Levels) -> None:
        self._walker, self._rows, self._levels = walker, rows, levels
        self._expected = self._dense()

    @torch.no_grad()
    def __call__(self, plans: Sequence[Mapping[str, Size]], rows: slice) -> NDArray[np.float64]:
        """Return the mean divergence over the predictions of each of these rows, (plans, rows), in the task's unit."""
        tokens, expected = self._rows[rows], self._expected[rows]
        leaving = self._leaving(plans, tokens)
        self._levels.keep(plans)
        found = np.empty((len(plans), len(tokens)))
        with self._walker.layers.head() as head:
            for row in range(len(tokens)):  # a batch's logits could be the largest tensor
                for number, hidden in enumerate(leaving):
                    found[number, row] = self._divergence(
                        head, tokens[row : row + 1], hidden[row : row + 1], expected[row]
                    )
        return found

    def _leaving(self, plans: Sequence[Mapping[str, Size]], tokens: Tensor) -> list[Tensor]:
        """Return what leaves the last layer, (n, S, H) for each plan."""
        walker, layers = self._walker, self._walker.layers
        entering = walker.embed(tokens).hidden
        found = [layers.allocate(*entering.shape).copy_(entering) for _ in plans]
        for index in range(layers.anatomy.layers):
            found = [walker.merged(index, hidden) for hidden in found]
            with layers.layer(index) as layer:
                for plan, hidden in zip(plans, found, strict=True):
                    with self._levels.written(layer, layers.anatomy.of_layer(index), plan):
                        walker.through(layer, index, hidden, hidden)
        return found

    @torch.no_grad()
    def _dense(self) -> list[tuple[Tensor, ...]]:
        """Return what `_divergence` compares with, row by row."""
        layers, rows = self._walker.layers, self._rows
        whole = {block.name: block.size for block in layers.anatomy.blocks}
        (leaving,) = self._leaving([whole], rows)
        if layers.task.name != CAUSAL.name:
            return [(hidden,) for hidden in leaving.split(1)]
        found: list[tuple[Tensor, ...]] = []
        with layers.head() as head:
            for row, hidden in zip(rows.split(1), leaving.split(1), strict=True):
                logits = _next_token(head(row, hidden.to(layers.device)))
                if logits.shape[-1] <= _WHOLE:
                    found.append((logits.log_softmax(-1),))
                else:
                    top = logits.topk(TOP_K, sorted=False).indices
                    found.append((bucketed(logits, top), top))
        return found

    def _divergence(self, head: Head, row: Tensor, hidden: Tensor, expected: tuple[Tensor, ...]) -> float:
        layers = self._walker.layers
        output = head(row, hidden.to(layers.device))
        if layers.task.name != CAUSAL.name:
            (dense,) = expected
            found = layers.task.divergence(output, head(row, dense.to(layers.device)), row.to(output.device))
        else:
            target, *top = expected
            logits = _next_token(output)
            found = kl_divergence(bucketed(logits, *top) if top else logits.log_softmax(-1), target)
        return float(found.mean())


def _next_token(logits: Tensor) -> Tensor:
    """Return the logits (S - 1, V) of one row's predictions, from (1, S, V), in float32."""
    return logits[0, :-1].float()
