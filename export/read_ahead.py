"""Reads a checkpoint's layers one ahead of those that are asked for, in a thread: the disk works while a layer is used.

The next layer is guessed from the last step, because a model is walked forwards or backwards. At most one layer is held
or read ahead, so a wrong guess costs one reading.
"""

import threading
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

T = TypeVar("T")


class ReadAhead(Generic[T]):
    """The tensors of layers by index.

    Args:
        layers: number of layers.
        names: layer -> names of its tensors.
        read: name -> tensor; called in this thread and in another one.
    """

    def __init__(self, layers: int, names: Callable[[int], Iterable[str]], read: Callable[[str], T]) -> None:
        self._layers, self._names, self._read = layers, names, read
        self._last = -1
        self._ahead: _Reading[T] | None = None

    def take(self, index: int) -> dict[str, T]:
        """Return the tensors of a layer by name, and begin to read the layer that is likely to be next.

        Raises what reading this layer raised; errors of a layer that is not asked for are never seen.
        """
        following = self._following(index)
        ahead, self._last = self._ahead, index
        if ahead is not None and ahead.index not in (index, following):
            self.stop()
        if ahead is not None and ahead.index == index:
            self._ahead = None
            found = ahead.result()
        else:
            found = {name: self._read(name) for name in self._names(index)}
        if self._ahead is None and following is not None:
            self._ahead = _Reading(following, [*self._names(following)], self._read)
        return found

    def stop(self) -> None:
        """Drop what was read ahead; a tensor that is being read is finished first."""
        if self._ahead is not None:
            self._ahead.stop()
            self._ahead = None

    def _following(self, index: int) -> int | None:
        """Return the likely next layer: one more step in the same direction.

        At the last layer, asked for twice, a walk turns; at the first one, after a layer that is not its neighbour, a
        new walk begins.
        """
        again = index == self._last and index < self._layers - 1
        forwards = index > self._last or again or (index == 0 and self._last > 1)
        following = index + (1 if forwards else -1)
        return following if 0 <= following < self._layers else None


class _Reading(Generic[T]):
    """A layer that is being read in a thread."""

    def __init__(self, index: int, names: Iterable[str], read: Callable[[str], T]) -> None:
        self.index = index
        self._names, self._read = names, read
        self._found: dict[str, T] = {}
        self._error: Exception | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"read layer {index}")
        self._thread.start()

    def result(self) -> dict[str, T]:
        """Return the tensors when all are read. Raises what reading raised."""
        try:
            self._thread.join()
        except BaseException:  # Ctrl-C
            self._stopped.set()
            raise
        if self._error is not None:
            raise self._error
        return self._found

    def stop(self) -> None:
        """Stop after the current tensor."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            for name in self._names:
                if self._stopped.is_set():
                    return
                self._found[name] = self._read(name)
        except Exception as error:
            self._error = error
