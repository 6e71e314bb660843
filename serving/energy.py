"""Energy that a GPU takes, as NVML counts it: from boards of the Volta generation on, in millijoules.

The counter is of the whole board, idle power included, and is updated every few milliseconds to tenths of a second.
Works shorter than about a second are measured badly.
"""

import ctypes
from collections.abc import Callable
from typing import Any
from uuid import UUID


class NotMeasured(Exception):
    """Why there is no counter."""


class EnergyMeter:
    """The counter of the GPU that a run computes on: CUDA's first.

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
            self._device = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{_first_device()}")
            pynvml.nvmlDeviceGetTotalEnergyConsumption(self._device)
        except pynvml.NVMLError as error:
            raise NotMeasured(f"NVML: {error}") from None

    def joules(self) -> float | None:
        """Taken since the driver was loaded; None if NVML fails now."""
        try:
            return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._device)) / 1e3
        except self._nvml.NVMLError:
            return None


def open_meter(*, on_gpu: bool) -> tuple[EnergyMeter | None, str]:
    """Return the meter, or None and why nothing is measured."""
    if not on_gpu:
        return None, "not measured on a CPU"
    try:
        return EnergyMeter(), "NVML, the whole board"
    except NotMeasured as reason:
        return None, f"not measured: {reason}"


def start_counting(meter: EnergyMeter | None) -> Callable[[], float | None]:
    """Return a function that says how many joules were taken since; None where that is not measured."""
    before = meter.joules() if meter else None

    def taken() -> float | None:
        after = meter.joules() if meter else None
        return None if before is None or after is None else after - before

    return taken


def _first_device() -> UUID:
    """CUDA's first device, by the driver. Raises NotMeasured.

    NVML counts boards in the order of their bus, CUDA by default the fastest first, and only those that
    CUDA_VISIBLE_DEVICES names. A part of a board (MIG) has a UUID of its own, which NVML does not count by.
    """
    driver = _open_driver()
    device, uuid = ctypes.c_int(), ctypes.create_string_buffer(16)
    status = driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0) or driver.cuDeviceGetUuid_v2(uuid, device)
    if status:
        raise NotMeasured(f"CUDA's driver: error {status}")
    return UUID(bytes=uuid.raw)


def _open_driver() -> Any:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise NotMeasured(f"CUDA's driver: {error}") from None
