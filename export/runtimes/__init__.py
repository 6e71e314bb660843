"""The runtimes of decoders, one per module, behind one Protocol: the benchmark times what `parity` has proved.

A runtime holds one batch at a time: `prefill` starts it, each `decode` extends its KV cache by one position. A call
returns its logits as float32 on the CPU, so its wall-clock time is its full cost.
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
            last_only: compute the logits of the last position only, enough for the first token.

        Returns:
            Logits (B, S, V), or (B, 1, V) with `last_only`; undefined at padding.
        """

    def decode(self, tokens: Tensor) -> Tensor:
        """Extend every row by one token: (B, 1) int64 -> logits (B, V)."""

    def describe(self) -> dict[str, Any]:
        """Plain JSON for a report: dtype, device, threads, versions, weight_bytes, kv_bytes_per_token."""


def device_of(name: str, device: str = "auto") -> str:
    """Return where a runtime would run, "cpu" or "cuda". If it is not installed, `open_runtime` says so."""
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
        device: `cpu`, `cuda`, or `auto` (CUDA if the runtime and the machine support it).
        threads: CPU threads for one operator; None: the runtime's default, or the CPU quota.
        dtype: the precision to compute a checkpoint in; an export has its own.

    Raises:
        InputError: unknown name or device, or a folder of another kind.
        IntegrityError: the folder is damaged.
        MissingRuntime: its libraries or the device are missing; says what to install.
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
