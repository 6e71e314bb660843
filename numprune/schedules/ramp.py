"""The cubic schedule of gradual pruning, and how the loss can delay it.

Zhu and Gupta, "To prune, or not to prune" (arXiv 1710.01878), eq. 1: s_i = s_f (1 - (1 - i / n)^3), which prunes fast
at first, while there is much redundancy, and slowly at the end.
"""

import math
from dataclasses import dataclass

from numprune.errors import InputError


@dataclass(frozen=True)
class Ramp:
    """The steps at which units are removed: `times` times, every `every` update steps, the first time after `first`."""

    first: int
    every: int
    times: int

    @classmethod
    def of(cls, steps: int, begin: float, end: float, every: int) -> "Ramp":
        """Return the ramp between two shares of a training.

        Raises:
            InputError: there are fewer than `every` steps between them.
        """
        first, last = max(1, round(begin * steps)), round(end * steps)
        if last - first < every:
            raise InputError(
                f"every is {every}, and from begin={begin:g} to end={end:g} a training of {steps} steps has "
                f"{max(0, last - first)}; prune more often, or train for longer"
            )
        return cls(first, every, (last - first) // every + 1)

    def includes(self, step: int) -> bool:
        """Return whether units are removed after this step. The ramp has no end, to make up postponed removals."""
        return step >= self.first and (step - self.first) % self.every == 0

    def share(self, done: int) -> float:
        """Return the share of the final ratio that is pruned after this number of removals."""
        return 1 - (1 - done / self.times) ** 3


@dataclass
class Pace:
    """The position of a training on the ramp.

    Attributes:
        done: number of finished removals.
        lowest: the lowest loss so far.
    """

    done: int = 0
    lowest: float = math.inf

    def next(self, ramp: Ramp, loss: float, tolerance: float) -> None:
        """Advance if the loss is within the tolerance of the lowest, go back beyond twice that, otherwise wait.

        Once the ratio is reached it stays.
        """
        self.lowest = min(self.lowest, loss)
        rise = loss - self.lowest
        if self.done == ramp.times:
            return
        if rise <= tolerance:
            self.done += 1
        elif rise > 2 * tolerance:
            self.done = max(0, self.done - 1)
