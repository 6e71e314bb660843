"""Whether something else than the two models decided what was measured.

Other load on the machine is no reason by itself: both sides meet it in turn, it widens the interval, and too wide an
interval ends as inconclusive. A reason is what the interval cannot show, or what leaves so little of the machine that
the figures describe its scheduler. Hence the limits are far above what a desktop or a CI runner shows.
"""

from dataclasses import asdict, dataclass

from numprune.serving.benchmark.scheduler import stolen_seconds

# A side that waited four times as long as it ran had a fifth of the CPUs it asked for. A program with as many busy
# threads as there are CPUs leaves it half; ten of them on two CPUs were seen to leave it a third.
WAITED_SHARE = 0.8
# The idle worker runs beside the measured one, so what it burns is charged to the other side. Thread pools that still
# spin for some milliseconds after a repeat stay below a tenth; one that spins on takes a whole CPU per thread.
IDLE_CPUS = 0.25
# Of the time the CPUs had work: the hypervisor gave it to somebody else, which no interleaving by us can even out.
STOLEN_SHARE = 0.25


@dataclass(frozen=True)
class SideContention:
    """One side over all its measured repeats. `waited_share` and None as in `ThreadTimes`."""

    waited_share: float | None  # of the time it ran or was ready to run
    idle_cpus: float  # CPUs that it kept busy while the other side was measured


@dataclass(frozen=True)
class Contention:
    """What was seen while measuring; `reasons` is empty when it does not put the measurement in doubt."""

    baseline: SideContention
    candidate: SideContention
    stolen_share: float

    @property
    def reasons(self) -> list[str]:
        found = []
        for name, side in (("baseline", self.baseline), ("candidate", self.candidate)):
            if side.waited_share is not None and side.waited_share > WAITED_SHARE:
                found.append(
                    f"the {name} waited for a free CPU {side.waited_share:.0%} of its time (limit {WAITED_SHARE:.0%}): "
                    "end other programs, or ask for fewer threads"
                )
            if side.idle_cpus > IDLE_CPUS:
                found.append(
                    f"the idle {name} kept {side.idle_cpus:.2f} CPUs busy while the other side was measured "
                    f"(limit {IDLE_CPUS}): its thread pool spins"
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


class StolenTime:
    """The share of CPU time that the hypervisor took since this was made."""

    def __init__(self) -> None:
        self._stolen, self._busy = stolen_seconds()

    def share(self) -> float:
        stolen, busy = stolen_seconds()
        return (stolen - self._stolen) / max(busy - self._busy, 1e-9)
