"""Measure the seconds and the peak memory of a piece of work in this process."""

import time

import torch

from numprune.serving.benchmark import memory


class Meter:
    """Created before the model is loaded; measures the work between `start` and `stop`.

    Memory is relative to that at creation (interpreter and libraries): the model's weights and everything derived from
    them. On a GPU, it is the memory of torch's tensors.
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
