"""The form in which a model is timed: quantized as its release will be, with weights rounded to nearest.

Values do not change latencies. GPTQ, which needs a text, comes later.
"""

from pathlib import Path
from typing import Any

import torch

from numprune.anatomy import read_anatomy
from numprune.errors import InputError
from numprune.export import genai
from numprune.export.vllm import check_quantized
from numprune.flows.steps.quantize import quantize_checkpoint
from numprune.quantization import check_quantizable
from numprune.served import Served
from numprune.serving.benchmark.visits import Runtime


def check_served(config: Any, used: Runtime, served: Served) -> None:
    """Refuse to time a model in a form that it or the runtime does not have. Raises InputError."""
    scheme = served.scheme
    if scheme is None:
        return
    check_quantizable(read_anatomy(config), scheme)
    if used.name == "torch":
        raise InputError(
            f"timings: torch dequantizes weights, so {scheme} has no latency there; choose onnxruntime or vllm"
        )
    if used.vllm is None:
        genai.check_config(config)
        genai.check_scheme(scheme, used.dtype)
        genai.check_lm_head(config, [scheme], served.lm_head_bits)
        return
    check_quantized(scheme, config.dtype, "cpu" if used.vllm.cpu else "gpu")
    if served.lm_head_bits != 8:
        raise InputError("lm_head_bits is 4, which only the export onnxruntime stores; use 8")


def as_served(source: Path, out: Path, served: Served) -> Path:
    """Return the checkpoint `source`, or one written to the new folder `out` if it is quantized to be served.

    Raises as `quantize_checkpoint`.
    """
    if served.scheme is None:
        return source
    quantize_checkpoint(source, served.scheme, out, torch.device("cpu"), lm_head_bits=served.lm_head_bits)
    return out
