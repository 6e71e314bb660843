"""How much memory this process takes: resident or on the GPU, now and at its highest since a moment one chooses."""

import threading
import time
from pathlib import Path
from typing import Protocol

import psutil
import torch

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_SAMPLING_INTERVAL_S = 0.02  # short against a load or a prefill, long against the time one sample takes (about 30 µs)


def resident_bytes() -> int:
    """Resident set size of this process: interpreter and libraries included."""
    return int(psutil.Process().memory_info().rss)


class Peak(Protocol):
    """The highest memory of this process since this was made, or since `restart`."""

    method: str  # how it is known

    def restart(self) -> None: ...

    def bytes(self) -> int: ...


class PeakResident:
    """Resident memory, by the kernel's own high-water mark where that lets itself be reset (Linux, unless a sandbox
    forbids it), else by a thread that samples.
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
        # The mark can lag behind what is resident now: the kernel folds the threads' own counts in late.
        return max(_high_water_bytes() if self._sampled is None else self._sampled, resident_bytes())

    def _sample(self) -> None:
        while True:
            time.sleep(_SAMPLING_INTERVAL_S)
            self._sampled = max(self._sampled or 0, resident_bytes())


class PeakCounted:
    """GPU memory of torch's own tensors, which torch counts."""

    def __init__(self) -> None:
        self.method = "torch.cuda.max_memory_allocated"
        self.restart()

    def restart(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def bytes(self) -> int:
        return int(torch.cuda.max_memory_allocated())


class PeakMissing:
    """GPU memory that is missing on the device since this was made, for runtimes with allocators of their own.

    They keep what they took, so what is missing after the work is the peak of the work, and `restart` has nothing to
    do. The other worker stands still meanwhile; a GPU that computes for third parties makes the environment invalid.
    """

    def __init__(self) -> None:
        self.method = "drop of torch.cuda.mem_get_info"
        self._free = torch.cuda.mem_get_info()[0]

    def restart(self) -> None:
        pass

    def bytes(self) -> int:
        return max(0, int(self._free - torch.cuda.mem_get_info()[0]))


def _reset_high_water() -> bool:
    """Whether the kernel took the mark back to what is resident now."""
    if not _CLEAR_REFS.exists():
        return False
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:  # a read-only /proc, or a sandbox without this call: `method` then says that we sampled
        return False
    return "VmHWM:" in _STATUS.read_text()


def _high_water_bytes() -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
