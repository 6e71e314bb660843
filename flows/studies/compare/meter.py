"""What a piece of work costs: seconds, and the highest memory of the process that does it."""

import time

import torch

from numprune.serving.benchmark import memory


class Meter:
    """Made before the model is loaded; measures what is done between `start` and `stop`.

    Memory is what this process takes beyond what it took when this was made (interpreter and libraries): the model's
    weights and all that is made of them. On a GPU it is what torch's tensors take there.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._peak: memory.Peak = memory.PeakCounted() if self._cuda else memory.PeakResident()
        self._before = 0 if self._cuda else memory.resident_bytes()
        self._started = 0.0

    def start(self) -> None:
        self._peak.restart()
        self._started = time.perf_counter()

    def stop(self) -> tuple[float, int]:
        """Return seconds and bytes."""
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - self._started, self._peak.bytes() - self._before
