"""Energy that a GPU takes, as NVML counts it: from boards of the Volta generation on, in millijoules.

The counter is of the whole board, idle power included, and is updated every few milliseconds to tenths of a second.
Works shorter than about a second are measured badly.
"""

import os
from typing import Any


class NotMeasured(Exception):
    """Why there is no counter."""


class EnergyMeter:
    """The counter of the GPU that a run computes on: the first of CUDA_VISIBLE_DEVICES.

    Raises:
        NotMeasured: NVML, the device or its counter is missing.
    """

    def __init__(self) -> None:
        try:
            import pynvml
        except ImportError:
            raise NotMeasured('nvidia-ml-py is not installed: pip install "numprune[gpu]"') from None
        self._nvml: Any = pynvml
        try:
            pynvml.nvmlInit()
            self._device = _device(pynvml, os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip())
            self.joules()
        except pynvml.NVMLError as error:
            raise NotMeasured(f"NVML: {error}") from None

    def joules(self) -> float:
        """Taken since the driver was loaded."""
        return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._device)) / 1e3


def open_meter(*, on_gpu: bool) -> tuple[EnergyMeter | None, str]:
    """Return the meter, or None and why nothing is measured."""
    if not on_gpu:
        return None, "not measured on a CPU"
    try:
        return EnergyMeter(), "NVML, the whole board"
    except NotMeasured as reason:
        return None, f"not measured: {reason}"


def _device(nvml: Any, name: str) -> Any:
    """Return the handle of a device by its index or its UUID."""
    if name.isdecimal():
        return nvml.nvmlDeviceGetHandleByIndex(int(name))
    return nvml.nvmlDeviceGetHandleByUUID(name)
