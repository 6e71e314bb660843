"""The machine that a run measures on, and whether its measurements are valid.

The GPU is read through nvidia-smi, which comes with every NVIDIA driver. A GPU that throttles, or that other processes
use, makes the environment invalid; so does a GPU that is used but cannot be read.
"""

import csv
import io
import os
import platform
import shutil
import subprocess
from collections.abc import Collection, Sequence
from importlib import metadata
from pathlib import Path

import psutil

from numprune.export import processors
from numprune.serving.report.models import Environment, Gpu

# Packages that affect measurements; missing ones are omitted.
PACKAGES = (
    "numprune",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "scipy",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "vllm",
    "prefect",
    "mlflow-skinny",
)

_FIELDS = {  # ours -> nvidia-smi's
    "name": "name",
    "uuid": "uuid",
    "driver": "driver_version",
    "memory_mib": "memory.total",
    "sm_clock_mhz": "clocks.sm",
    "max_sm_clock_mhz": "clocks.max.sm",
    "power_limit_watts": "power.limit",
    "temperature_celsius": "temperature.gpu",
    "throttle": "clocks_throttle_reasons.active",
}

# Bits of the throttle mask. Idle (0x1), application clocks (0x2), the software power cap (0x4), sync boost (0x10) and
# display clocks (0x100) are normal on a healthy GPU.
_THROTTLE = {
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}


class _UnreadableError(Exception):
    """nvidia-smi is missing, failed, or printed unexpected output."""


def capture(*, uses_gpu: bool = False, own_processes: Collection[int] = ()) -> Environment:
    """Describe the machine now.

    Args:
        uses_gpu: the run computes on the GPU (the first of CUDA_VISIBLE_DEVICES), so its state decides validity;
            otherwise no GPU is read.
        own_processes: ids of the run's processes, besides this one and its children, that may use the GPU.
    """
    gpu: Gpu | None = None
    reasons: list[str] = []
    if uses_gpu:
        own = {os.getpid(), *own_processes, *(child.pid for child in psutil.Process().children(recursive=True))}
        try:
            gpu = _gpu(own)
            reasons += [f"{gpu.name} is throttled: {why}" for why in gpu.throttle]
            reasons += [f"{gpu.name} is used by another process, too: {pid}" for pid in gpu.processes]
        except _UnreadableError as problem:
            reasons.append(f"the GPU's state cannot be read: {problem}")
    return Environment(
        cpu=_cpu(),
        cores=processors.count(),
        memory_bytes=psutil.virtual_memory().total,
        platform=f"{platform.platform()}, Python {platform.python_version()}",
        gpu=gpu,
        load_average=os.getloadavg(),
        valid=not reasons,
        reasons=tuple(reasons),
    )


def combine(before: Environment, after: Environment) -> Environment:
    """Combine two looks at the machine: the state before the run, with the reasons of both."""
    reasons = tuple(dict.fromkeys([*before.reasons, *after.reasons]))
    return before.model_copy(update={"valid": not reasons, "reasons": reasons})


def package_versions(names: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Versions of the installed packages."""
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _cpu() -> str:
    """The model name from the kernel, or the architecture if the kernel has no name (Arm)."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8", errors="replace").splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _gpu(own: Collection[int]) -> Gpu:
    """The GPU that the run computes on; `own` are process ids that may use it."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    rows = _query("gpu", list(_FIELDS.values()), first)
    if len(rows) != 1 or len(rows[0]) != len(_FIELDS):
        raise _UnreadableError(f"nvidia-smi shows {len(rows)} devices for {first!r}")
    shown = dict(zip(_FIELDS, rows[0], strict=True))
    memory = _figure(shown["memory_mib"])
    processes = [int(pid) for (pid,) in _query("compute-apps", ["pid"], first) if pid.isdecimal()]
    return Gpu(
        name=shown["name"],
        uuid=shown["uuid"],
        driver=shown["driver"],
        memory_bytes=None if memory is None else int(memory) << 20,
        sm_clock_mhz=_figure(shown["sm_clock_mhz"]),
        max_sm_clock_mhz=_figure(shown["max_sm_clock_mhz"]),
        power_limit_watts=_figure(shown["power_limit_watts"]),
        temperature_celsius=_figure(shown["temperature_celsius"]),
        throttle=_throttle(shown["throttle"]),
        processes=tuple(sorted(set(processes) - set(own))),
    )


def _throttle(mask: str) -> tuple[str, ...]:
    try:
        bits = int(mask, 16)
    except ValueError:
        raise _UnreadableError(f"nvidia-smi reports {mask!r} as throttle reasons") from None
    return tuple(name for bit, name in _THROTTLE.items() if bits & bit)


def _figure(text: str) -> float | None:
    """nvidia-smi's number, or None for its `[N/A]` and `[Not Supported]`."""
    try:
        return float(text)
    except ValueError:
        return None


def _query(what: str, fields: Sequence[str], device: str) -> list[list[str]]:
    """Rows of `nvidia-smi --query-<what>` for one device (an index or a UUID)."""
    program = shutil.which("nvidia-smi")
    if program is None:
        raise _UnreadableError("nvidia-smi is not on the PATH")
    command = [program, f"--query-{what}={','.join(fields)}", "--format=csv,noheader,nounits", f"--id={device}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as problem:
        raise _UnreadableError(f"nvidia-smi: {problem}") from None
    if done.returncode != 0:
        raise _UnreadableError(f"nvidia-smi: {(done.stdout + done.stderr).strip()[:200]}")
    return [[cell.strip() for cell in row] for row in csv.reader(io.StringIO(done.stdout)) if row]
