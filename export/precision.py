"""The precision that a model is computed in: as requested, or chosen for the device."""

from pathlib import Path

import torch
from torch import Tensor

from numprune.dtypes import name_of as name_of  # for `serving`, too
from numprune.errors import InputError, IntegrityError
from numprune.export.config import read_config

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AUTO = "auto"
FLOAT32 = "float32"


def stored(folder: Path) -> str:
    """Return the precision that a checkpoint's weights are stored in. Raises like `read_config`."""
    return name_of(read_config(folder).dtype)


def choose(asked: str, found: str, runtime: str, device: str) -> str:
    """Return the precision that a model is computed in.

    For vLLM, "auto" means the stored precision. For other runtimes it means float32 on a CPU; on a GPU, the stored half
    precision or float32. ONNX Runtime's CPU provider accepts float16, but computes in float32 and is no faster.

    Args:
        asked: "auto" or one of `DTYPES`.
        found: the stored precision, as returned by `stored`.
        runtime: a name of `numprune.export.runtimes`, or "vllm".
        device: "cpu" or "cuda".

    Raises InputError if the runtime does not support `asked` on that device.
    """
    if asked != AUTO and asked not in DTYPES:
        raise InputError(f"dtype={asked!r}: choose one of {', '.join((AUTO, *DTYPES))}")
    if runtime == "vllm":
        return found if asked == AUTO else asked
    if asked == AUTO:
        return found if device != "cpu" and found in DTYPES else FLOAT32
    if (runtime, device, asked) == ("onnxruntime", "cpu", "bfloat16"):
        raise InputError(
            "dtype=bfloat16: ONNX Runtime has no bfloat16 kernels for a CPU; use auto, float32 or float16, or a GPU"
        )
    return asked


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `tensor`, called `name`, in `dtype` on the CPU.

    Raises IntegrityError if a value is NaN or infinite, or too large for `dtype`.
    """
    found = tensor.to(dtype).cpu()
    if torch.isfinite(found).all():
        return found
    if not torch.isfinite(tensor).all():
        raise IntegrityError(f"{name}: values are NaN or infinite; nothing was written")
    raise IntegrityError(
        f"{name}: {tensor.abs().max():.4g} is out of range of {name_of(dtype)} ({torch.finfo(dtype).max:.4g}); use "
        "bfloat16 or float32 (`numprune export --to vllm --dtype …` converts a checkpoint)"
    )
