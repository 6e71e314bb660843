"""The kernel's scheduler: what it says of a process and of the machine, and how to keep a process from running."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class ThreadTimes:
    """Seconds, summed over the threads of a process: computing, and ready to compute while no CPU was free.

    Both are 0 where the kernel does not tell (anything but Linux).
    """

    ran_s: float
    waited_s: float

    def __sub__(self, earlier: "ThreadTimes") -> "ThreadTimes":
        return ThreadTimes(self.ran_s - earlier.ran_s, self.waited_s - earlier.waited_s)


def thread_times(pid: int | None = None) -> ThreadTimes:
    """Of a process, or of this one, since its threads began."""
    ran_ns = waited_ns = 0
    for file in Path(f"/proc/{pid or 'self'}/task").glob("*/schedstat"):
        try:
            ran, waited, _ = file.read_text().split()
        except (FileNotFoundError, ProcessLookupError):  # the thread ended since the folder was listed
            continue
        ran_ns += int(ran)
        waited_ns += int(waited)
    return ThreadTimes(ran_ns / 1e9, waited_ns / 1e9)


@contextmanager
def standing_still(pids: Iterable[int]) -> Iterator[None]:
    """Within the block these processes do not run (SIGSTOP, SIGCONT); one that has ended is passed over.

    Models that are not at work must not take CPUs from the one that is: thread pools and engines spin while they wait.
    """
    processes = []
    try:
        for pid in pids:
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                processes.append(process)
                process.suspend()
        yield
    finally:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.resume()


def family(pid: int) -> list[int]:
    """A process and all that descend from it, now."""
    process = psutil.Process(pid)
    return [pid, *(child.pid for child in process.children(recursive=True))]


def stolen_seconds() -> tuple[float, float]:
    """(taken by the hypervisor, all that was not idle, the taken included), of all CPUs since the machine started."""
    times = psutil.cpu_times()._asdict()
    idle = times["idle"] + times.get("iowait", 0.0)
    counted_twice = times.get("guest", 0.0) + times.get("guest_nice", 0.0)  # inside user and nice already
    return float(times.get("steal", 0.0)), float(sum(times.values()) - idle - counted_twice)
