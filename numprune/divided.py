"""Work on blocks that does not depend on the results for other blocks, divided among the processes."""

from collections.abc import Callable

import torch
from torch import Tensor

from numprune.processes import Processes

_DIMENSIONS = 2


class Divided:
    """Results by block name. Each process does the work of every n-th block, and n blocks are worked on at a time.

    A process keeps the inputs of one block until the others have one, too. All processes must add the same blocks in
    the same order.

    Args:
        processes: that share the work.
    """

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._waiting: list[str] = []
        self._own: Callable[[], Tensor] | None = None
        self._results: dict[str, Tensor] = {}

    def add(self, name: str, work: Callable[[], Tensor]) -> None:
        """Add the work of a block, which must not need the block's layer; it returns one or two dimensions."""
        if len(self._waiting) == self._processes.index:
            self._own = work
        self._waiting.append(name)
        if len(self._waiting) == self._processes.count:
            self._work()

    def results(self) -> dict[str, Tensor]:
        """Return all results, in float64 on the CPU. Raises ProcessError."""
        self._work()
        return self._results

    def _work(self) -> None:
        own = self._own().to("cpu", torch.float64) if self._own is not None else None
        for index, name in enumerate(self._waiting):
            mine = own if index == self._processes.index else None
            shape = torch.zeros(_DIMENSIONS, dtype=torch.int64)
            if mine is not None:
                shape[: mine.dim()] = torch.tensor(mine.shape)
            self._processes.add_up(shape)
            sizes = [size for size in shape.tolist() if size]
            total = torch.zeros(sizes, dtype=torch.float64) if mine is None else mine
            self._processes.add_up(total)
            self._results[name] = total
        self._waiting, self._own = [], None
