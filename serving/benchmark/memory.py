"""Memory of this process, resident or on the GPU: now, and its peak since a chosen moment."""

import threading
import time
from pathlib import Path
from typing import Protocol

import psutil
import torch

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_SAMPLING_INTERVAL_S = 0.02  # short compared with a load or a prefill, long compared with taking a sample (about 30 µs)


def resident_bytes() -> int:
    """Resident set size of this process: interpreter and libraries included."""
    return int(psutil.Process().memory_info().rss)


class Peak(Protocol):
    """The peak memory of this process since this object was created, or since `restart`."""

    method: str  # how it is measured

    def restart(self) -> None: ...

    def bytes(self) -> int: ...


class PeakResident:
    """Resident memory: the kernel's high-water mark if it can be reset (Linux, unless a sandbox forbids it), otherwise
    sampled by a thread.
    """

    def __init__(self) -> None:
        self._sampled: int | None = None
        self.method = "VmHWM"
        if not _reset_high_water():
            self.method = f"resident, sampled every {_SAMPLING_INTERVAL_S * 1e3:.0f} ms"
            self._sampled = resident_bytes()
            threading.Thread(target=self._sample, daemon=True).start()

    def restart(self) -> None:
        if self._sampled is None:
            _reset_high_water()
        else:
            self._sampled = resident_bytes()

    def bytes(self) -> int:
        # The mark can lag behind the current value: the kernel adds per-thread counts late.
        return max(_high_water_bytes() if self._sampled is None else self._sampled, resident_bytes())

    def _sample(self) -> None:
        while True:
            time.sleep(_SAMPLING_INTERVAL_S)
            self._sampled = max(self._sampled or 0, resident_bytes())


class PeakCounted:
    """GPU memory of torch's tensors, counted by torch; of a spread model, the sum of the GPUs' peaks."""

    def __init__(self) -> None:
        self.method = "torch.cuda.max_memory_allocated"
        self.restart()

    def restart(self) -> None:
        torch.cuda.init()  # before that, a GPU that is given by number has no counter
        for gpu in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(gpu)

    def bytes(self) -> int:
        return sum(int(torch.cuda.max_memory_allocated(gpu)) for gpu in range(torch.cuda.device_count()))


class PeakMissing:
    """GPU memory no longer free since this object was created, for runtimes with their own allocators.

    They do not return memory, so what is missing after the work is its peak, and `restart` does nothing. The other
    worker is suspended meanwhile; a GPU that is used by other processes makes the environment invalid.
    """

    def __init__(self) -> None:
        self.method = "drop of torch.cuda.mem_get_info"
        self._free = torch.cuda.mem_get_info()[0]

    def restart(self) -> None:
        pass

    def bytes(self) -> int:
        return max(0, int(self._free - torch.cuda.mem_get_info()[0]))


def _reset_high_water() -> bool:
    """Whether the kernel reset the mark to the current value."""
    if not _CLEAR_REFS.exists():
        return False
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:  # a read-only /proc, or a sandbox without this call: `method` then states that memory was sampled
        return False
    return "VmHWM:" in _STATUS.read_text()


def _high_water_bytes() -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
