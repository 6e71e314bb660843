"""The kernel's scheduler: its figures for a process and the machine, and suspending processes."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class ThreadTimes:
    """Seconds, summed over the threads of a process: computing, and ready to compute while no CPU was free.

    Both are 0 on kernels that do not report them (anything but Linux).
    """

    ran_s: float
    waited_s: float

    def __sub__(self, earlier: "ThreadTimes") -> "ThreadTimes":
        return ThreadTimes(self.ran_s - earlier.ran_s, self.waited_s - earlier.waited_s)


def thread_times(pid: int | None = None) -> ThreadTimes:
    """The times of a process, by default this one, since its threads started."""
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
    """Suspend these processes within the block (SIGSTOP, SIGCONT); ended ones are skipped.

    Idle models must not take CPU time from the active one: thread pools and engines spin while they wait.
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
    """A process and all its current descendants."""
    process = psutil.Process(pid)
    return [pid, *(child.pid for child in process.children(recursive=True))]


def stolen_seconds() -> tuple[float, float]:
    """(stolen by the hypervisor, all non-idle time including that), over all CPUs since boot."""
    times = psutil.cpu_times()._asdict()
    idle = times["idle"] + times.get("iowait", 0.0)
    counted_twice = times.get("guest", 0.0) + times.get("guest_nice", 0.0)  # already counted in user and nice
    return float(times.get("steal", 0.0)), float(sum(times.values()) - idle - counted_twice)
