"""Whether something other than the two models determined what was measured.

Other load on the machine is not a reason by itself: both sides are exposed to it in turn, it widens the interval, and
an interval that is too wide is inconclusive. A reason is what the interval cannot show, or what leaves so little CPU
time that the figures describe the scheduler. The limits are therefore far above what a desktop or a CI runner shows.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from numprune.serving.benchmark.scheduler import ThreadTimes, stolen_seconds

# A side that waited four times as long as it ran got a fifth of the CPU time it requested. A program with as many busy
# threads as CPUs leaves it half; ten of them on two CPUs left it a third.
WAITED_SHARE = 0.8
# Steal time as a share of busy time: the hypervisor ran other guests, which interleaving cannot average out.
STOLEN_SHARE = 0.25


@dataclass(frozen=True)
class Contention:
    """CPU contention during a measurement; `reasons` is empty if it does not invalidate the measurement.

    A side's waited share refers to the time that it ran or was ready to run, over all its measured repeats; None if the
    kernel does not report it.
    """

    baseline_waited_share: float | None
    candidate_waited_share: float | None
    stolen_share: float

    @property
    def reasons(self) -> list[str]:
        found = []
        for name, share in (("baseline", self.baseline_waited_share), ("candidate", self.candidate_waited_share)):
            if share is not None and share > WAITED_SHARE:
                found.append(
                    f"the {name} waited for a free CPU {share:.0%} of its time (limit {WAITED_SHARE:.0%}): "
                    "stop other programs, or use fewer threads"
                )
        if self.stolen_share > STOLEN_SHARE:
            found.append(
                f"the hypervisor took {self.stolen_share:.0%} of the CPU time (limit {STOLEN_SHARE:.0%}): "
                "measure on a machine that is not shared"
            )
        return found

    def describe(self) -> dict[str, object]:
        """Plain JSON."""
        return asdict(self)


def waited_share(times: Iterable[ThreadTimes]) -> float | None:
    """The waited share of the total time; None if the total is zero, as on kernels that do not report it."""
    found = list(times)
    ran_s, waited_s = sum(one.ran_s for one in found), sum(one.waited_s for one in found)
    return waited_s / (ran_s + waited_s) if ran_s + waited_s > 0 else None


class StolenTime:
    """The share of CPU time that the hypervisor took since this object was created."""

    def __init__(self) -> None:
        self._stolen, self._busy = stolen_seconds()

    def share(self) -> float:
        stolen, busy = stolen_seconds()
        return (stolen - self._stolen) / max(busy - self._busy, 1e-9)
