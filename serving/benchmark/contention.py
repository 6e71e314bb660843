"""Whether something else than the two models decided what was measured.

Other load on the machine is no reason by itself: both sides meet it in turn, it widens the interval, and too wide an
interval ends as inconclusive. A reason is what the interval cannot show, or what leaves so little of the machine that
the figures describe its scheduler. Hence the limits are far above what a desktop or a CI runner shows.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from numprune.serving.benchmark.scheduler import ThreadTimes, stolen_seconds

# A side that waited four times as long as it ran had a fifth of the CPUs it asked for. A program with as many busy
# threads as there are CPUs leaves it half; ten of them on two CPUs were seen to leave it a third.
WAITED_SHARE = 0.8
# Steal time, as a share of busy time: the hypervisor ran other guests, which interleaving cannot even out.
STOLEN_SHARE = 0.25


@dataclass(frozen=True)
class Contention:
    """What was seen while measuring; `reasons` is empty when it does not put the measurement in doubt.

    A side's waited share is of the time that it ran or was ready to run, over all its measured repeats; None where the
    kernel does not tell.
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
                    "end other programs, or ask for fewer threads"
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
    """The share of this time; None if it is zero, as where the kernel does not report it."""
    found = list(times)
    ran_s, waited_s = sum(one.ran_s for one in found), sum(one.waited_s for one in found)
    return waited_s / (ran_s + waited_s) if ran_s + waited_s > 0 else None


class StolenTime:
    """The share of CPU time that the hypervisor took since this was made."""

    def __init__(self) -> None:
        self._stolen, self._busy = stolen_seconds()

    def share(self) -> float:
        stolen, busy = stolen_seconds()
        return (stolen - self._stolen) / max(busy - self._busy, 1e-9)
