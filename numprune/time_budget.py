"""A budget of time: the measured latency of one step of the whole model.

No tensor library is needed.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated

from pydantic import Field

from numprune.blocks import Anatomy, Block
from numprune.errors import InputError
from numprune.scenario import StepLimit
from numprune.served import AS_STORED, Served
from numprune.slices import Size
from numprune.target import Sizes
from numprune.timings import BlockTime, ScenarioTimes, Time

PER_MS = 1_000_000  # costs are whole nanoseconds, rounded up
_SHOWN = 6  # sizes shown


@dataclass(frozen=True)
class TimeBudget:
    """The limit of one step's latency, in milliseconds.

    Attributes:
        limit_ms: of the whole model; infinite for a speedup before `resolved`.
        times: hidden size -> of the blocks and around them, measured or estimated in the budget's scenario. Empty
            before that: then only what does not depend on times can be checked.
        runtime: in which they were measured; "roofline" for an estimate.
        correction: factor of all times, from measuring a whole model.
        served: how the models were that gave the times.
        speedup: the limit is the unpruned model's latency divided by this; None: it was given in milliseconds.
    """

    limit_ms: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    times: Mapping[Annotated[int, Field(ge=1)], ScenarioTimes]
    runtime: str
    correction: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    served: Served = AS_STORED
    speedup: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = None

    @classmethod
    def of(cls, limit: StepLimit, times: Mapping[int, ScenarioTimes], runtime: str, served: Served) -> "TimeBudget":
        """Return the budget for a limit, which may still have to be `resolved`."""
        return cls(math.inf if limit.ms is None else limit.ms, times, runtime, served=served, speedup=limit.speedup)

    def resolved(self, dense: Anatomy) -> "TimeBudget":
        """Return the budget in milliseconds, if it is a speedup over the dense model.

        Raises:
            InputError: the dense model's latency is not known, as `check_measured`.
        """
        return self if self.speedup is None else self.within(self.predicted(dense).ms / self.speedup)

    def within(self, limit_ms: float) -> "TimeBudget":
        """Return the budget with another limit."""
        return replace(self, limit_ms=limit_ms)

    def __str__(self) -> str:
        said = f"@{self.scenario}" if self.times else ""
        estimated = f" (estimated for {device})" if (device := self.estimated_for) else ""
        limit = f"{self.limit_ms:.4g} ms" if self.speedup is None else f"{self.speedup:g}x"
        return f"{limit}{said}{estimated}"

    @property
    def described(self) -> str:
        """The budget with the runtime in which it was measured, if it was, and how models are served there."""
        where = "" if self.estimated_for else f" in {self.runtime}"
        how = str(self.served)
        return f"{self}{where} ({how})" if how else f"{self}{where}"

    @property
    def scenario(self) -> str:
        """The scenario of the times, which are not empty."""
        return next(times.scenario for times in self.times.values())

    @property
    def estimated_for(self) -> str | None:
        """The device that the times are estimated for; None: they were measured, or will be."""
        return next((times.estimated_for for times in self.times.values()), None)

    @cached_property
    def _by_size(self) -> dict[tuple[int, str, Size], BlockTime]:
        return {
            (hidden_size, kind, time.size): time
            for hidden_size, times in self.times.items()
            for kind, measured in times.blocks.items()
            for time in measured
        }

    def cost(self, block: Block, size: Size) -> int:
        """Return the nanoseconds of a block at this size, rounded up; it must have been measured."""
        return self._nanoseconds(self._by_size[block.hidden_size, block.timed_as, size]) if size.units else 0

    def sizes(self, block: Block) -> list[Size]:
        """Return the measured sizes of blocks of this kind and hidden size."""
        times = self.times.get(block.hidden_size)
        return [time.size for time in times.blocks.get(block.timed_as, [])] if times else []

    @property
    def limit(self) -> int:
        """`limit_ms` in whole nanoseconds, rounded down."""
        return math.floor(self.limit_ms * PER_MS)

    def around(self, anatomy: Anatomy) -> int:
        """Return the nanoseconds around the blocks of a model, rounded up; its hidden size must have been measured."""
        return self._nanoseconds(self.times[anatomy.hidden_size].around)

    def _nanoseconds(self, time: Time) -> int:
        return math.ceil(time.ms * self.correction * PER_MS)

    def corrected(self, factor: float) -> "TimeBudget":
        """Return the budget with all times multiplied by `factor`."""
        return replace(self, correction=self.correction * factor)

    def measured(self, block: Block, size: Size) -> bool:
        """Return whether the table has the time of a block at this size.

        A removed block takes none, unless blocks were timed within layers: then the others hold a share of its time.
        """
        if size.units:
            return (block.hidden_size, block.timed_as, size) in self._by_size
        return not any(times.within_layers for times in self.times.values())

    def predicted(self, anatomy: Anatomy) -> Time:
        """Return the predicted latency of a model.

        Blocks of one size share the error of their time; errors of different sizes are independent.

        Raises:
            InputError: as `check_measured`.
        """
        self.check_measured(anatomy)
        counts = Counter((block.hidden_size, block.timed_as, block.size) for block in anatomy.blocks if block.units)
        around = self.times[anatomy.hidden_size].around
        parts: list[tuple[int, Time]] = [(1, around), *((count, self._by_size[one]) for one, count in counts.items())]
        ms = math.fsum(count * time.ms for count, time in parts)
        below, above = (
            math.sqrt(math.fsum((count * (time.interval95[side] - time.ms)) ** 2 for count, time in parts))
            for side in (0, 1)
        )
        return Time(
            ms=ms * self.correction, interval95=((ms - below) * self.correction, (ms + above) * self.correction)
        )

    def check_measured(self, anatomy: Anatomy) -> None:
        """Raise InputError if the hidden size was not measured, or a block has a size that was not."""
        if anatomy.hidden_size not in self.times:
            known = ", ".join(map(str, self.times))
            raise InputError(
                f"timings: hidden size {anatomy.hidden_size} was not measured; measured are {known}; run numprune "
                f"timings with --hidden-size {anatomy.hidden_size}"
            )
        for block in anatomy.blocks:
            if not self.measured(block, block.size):
                raise InputError(f"timings: {self.missing(block)}")

    def missing(self, block: Block) -> str:
        """Return a block's size and the measured ones, in words."""
        known = [_told(size) for size in self.sizes(block)]
        shown = ", ".join(known[:_SHOWN]) + (" …" if len(known) > _SHOWN else "")
        return f"{block.name} has {_told(block.size)}, and the table has {block.timed_as} of {shown or 'no size'} units"


def measured_sizes(anatomy: Anatomy, allowed: Sizes, budget: TimeBudget) -> Sizes:
    """Return the allowed sizes that were measured. Raises InputError if a block has none."""
    found = {
        block.name: [size for size in allowed[block.name] if budget.measured(block, size)] for block in anatomy.blocks
    }
    for block in anatomy.blocks:
        if not found[block.name] or (block.units and not any(size.units for size in found[block.name])):
            raise InputError(
                f"timings: none of the allowed sizes of {block.name} was measured; {budget.missing(block)}"
            )
    return found


def _told(size: Size) -> str:
    return f"{size.units}" if size.members == 1 else f"{size.units}x{size.members}"
