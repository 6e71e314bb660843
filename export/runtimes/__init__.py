"""Programs that run a decoder, one per module, behind one Protocol: what `parity` proves is what the benchmark times.

A runtime holds one batch at a time: `prefill` starts it, each `decode` extends its KV cache by one position. Logits are
float32 on the CPU when a call returns, so its wall-clock time is all it cost.
"""

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from numprune.errors import InputError
from numprune.export.precision import FLOAT32

NAMES = ("torch", "onnxruntime", "tensorrt")
DEVICES = ("auto", "cpu", "cuda")


class Runtime(Protocol):
    """A model loaded into one runtime."""

    name: str
    vocabulary: int

    def prefill(self, tokens: Tensor, mask: Tensor | None = None, *, last_only: bool = False) -> Tensor:
        """Start a new batch.

        Args:
            tokens: (B, S) int64.
            mask: (B, S), 1 = token, 0 = padding on the left; None: no padding.
            last_only: compute the logits of the last position alone, which is what the first token needs.

        Returns:
            Logits (B, S, V), or (B, 1, V) with `last_only`; at padding they mean nothing.
        """

    def decode(self, tokens: Tensor) -> Tensor:
        """Extend every row by one token: (B, 1) int64 -> logits (B, V)."""

    def describe(self) -> dict[str, Any]:
        """Plain JSON for a report: dtype, device, threads, versions, weight_bytes, kv_bytes_per_token."""


def device_of(name: str, device: str = "auto") -> str:
    """Where a runtime would run: "cpu" or "cuda". Of one that is not installed, `open_runtime` says so."""
    if name == "tensorrt":
        return "cuda"
    if name != "onnxruntime":
        return "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    try:
        from numprune.export.runtimes.ort import CUDA, choose_provider
    except ImportError:
        return "cpu"
    return "cuda" if choose_provider(device) == CUDA else "cpu"


def open_runtime(
    name: str, folder: Path, *, device: str = "auto", threads: int | None = None, dtype: str = FLOAT32
) -> Runtime:
    """Load `folder` into the runtime `name`.

    Args:
        name: `torch` (a checkpoint folder), `onnxruntime` (of `export.onnx` or `export.genai`) or `tensorrt` (of
            `export.tensorrt`).
        folder: what to load.
        device: `cpu`, `cuda`, or `auto`: CUDA where the runtime and the machine have it.
        threads: of the CPU, for one operator; None: the runtime's own default, or the CPU quota.
        dtype: that a checkpoint is computed in; an export has its own.

    Raises:
        InputError: unknown name or device, or a folder of another kind.
        IntegrityError: the folder is not whole.
        MissingRuntime: its libraries or the device are not there; says what to install.
    """
    if device not in DEVICES:
        raise InputError(f"device={device!r}: choose one of {', '.join(DEVICES)}")
    match name:
        case "torch":
            from numprune.export.runtimes.torch_eager import TorchRuntime

            return TorchRuntime(folder, device=device, threads=threads, dtype=dtype)
        case "onnxruntime":
            from numprune.export import genai, manifest
            from numprune.export.runtimes.ort import OnnxRuntime
            from numprune.export.runtimes.ort_fused import FusedOnnxRuntime

            if manifest.read(folder).kind == genai.KIND:
                return FusedOnnxRuntime(folder, device=device, threads=threads)
            return OnnxRuntime(folder, device=device, threads=threads)
        case "tensorrt":
            from numprune.export.runtimes.trt import TensorRTRuntime

            return TensorRTRuntime(folder, device=device)
    raise InputError(f"runtime={name!r}: choose one of {', '.join(NAMES)}")
