"""How much is pruned when: the cubic schedule, and how the loss holds it up.

Zhu and Gupta, "To prune, or not to prune" (arXiv 1710.01878), eq. 1: s_i = s_f (1 - (1 - i / n)^3), which prunes fast
while there is much to spare and slowly at the end.
"""

import math
from dataclasses import dataclass

from numprune.errors import InputError


@dataclass(frozen=True)
class Ramp:
    """When units go, in update steps: `times` times, every `every` steps, the first time after `first`."""

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
        """Whether it is time after so many steps. The ramp has no end: what waited is made up for."""
        return step >= self.first and (step - self.first) % self.every == 0

    def share(self, done: int) -> float:
        """Return the share of the final ratio that is pruned once it was done so many times."""
        return 1 - (1 - done / self.times) ** 3


@dataclass
class Pace:
    """How far along the ramp a training is.

    Attributes:
        done: how many of its times.
        lowest: the lowest loss so far.
    """

    done: int = 0
    lowest: float = math.inf

    def next(self, ramp: Ramp, loss: float, tolerance: float) -> None:
        """Go on where the loss is within the tolerance of the lowest, back where it exceeds twice that, or wait.

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
