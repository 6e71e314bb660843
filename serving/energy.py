"""Energy of a GPU as counted by NVML, in millijoules, on boards of the Volta generation or newer.

The counter covers the whole board, including idle power, and is updated every few milliseconds to tenths of a second.
Work shorter than about a second is measured inaccurately.
"""

import ctypes
from collections.abc import Callable
from typing import Any
from uuid import UUID


class NotMeasured(Exception):
    """The reason why there is no counter."""


class EnergyMeter:
    """The counter of the GPU used by a run: CUDA's first device.

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
        """Joules since the driver was loaded; None if NVML fails now."""
        try:
            return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._device)) / 1e3
        except self._nvml.NVMLError:
            return None


def open_meter(*, on_gpu: bool) -> tuple[EnergyMeter | None, str]:
    """Return the meter, or None and the reason why nothing is measured."""
    if not on_gpu:
        return None, "not measured on a CPU"
    try:
        return EnergyMeter(), "NVML, the whole board"
    except NotMeasured as reason:
        return None, f"not measured: {reason}"


def start_counting(meter: EnergyMeter | None) -> Callable[[], float | None]:
    """Return a function that returns the joules used since this call; None if they are not measured."""
    before = meter.joules() if meter else None

    def taken() -> float | None:
        after = meter.joules() if meter else None
        return None if before is None or after is None else after - before

    return taken


def _first_device() -> UUID:
    """The UUID of CUDA's first device, from the driver. Raises NotMeasured.

    NVML orders boards by bus id. CUDA by default puts the fastest first, and only lists those in CUDA_VISIBLE_DEVICES.
    A part of a board (MIG) has its own UUID, for which NVML has no energy counter.
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
