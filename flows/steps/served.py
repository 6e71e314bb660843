"""The form in which a model is timed: quantized as its release will be, with weights rounded to nearest.

Values do not change latencies. GPTQ, which needs a text, comes later.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from numprune.anatomy import read_anatomy
from numprune.blocks import Anatomy
from numprune.errors import InputError
from numprune.export import genai
from numprune.export.vllm import check_quantized
from numprune.flows.names import ENGINE_BATCH, ENGINE_LENGTH
from numprune.flows.steps.benchmark import exported_as
from numprune.flows.steps.export import export
from numprune.flows.steps.quantize import quantize_checkpoint
from numprune.quantization import check_quantizable
from numprune.served import Served
from numprune.serving.benchmark.load import Load
from numprune.serving.benchmark.visits import Runtime, Timed
from numprune.target import not_split


def check_served(config: Any, used: Runtime, served: Served) -> None:
    """Refuse to time a model in a form that it or the runtime does not have. Raises InputError."""
    scheme = served.scheme
    check_divisible(read_anatomy(config), served)
    devices, here = served.tensor_parallel, torch.cuda.device_count()
    if devices > 1 and used.vllm is None:
        raise InputError(f"timings: tensor_parallel is {devices}, and {used.name} runs on one device; choose vllm")
    if used.device == "cuda" and 0 < here < devices:
        raise InputError(f"timings: tensor_parallel is {devices}, and this machine has {here} GPUs; choose another one")
    if scheme is None:
        return
    if used.name == "torch":
        raise InputError(
            f"timings: torch dequantizes weights, so {scheme} has no latency there; choose onnxruntime or vllm"
        )
    if used.name == "tensorrt":
        raise InputError(
            f"timings: engines are built only from unquantized checkpoints, so not in {scheme}; choose onnxruntime or "
            "vllm"
        )
    if used.vllm is None:
        genai.check_config(config)
        genai.check_scheme(scheme, used.dtype)
        genai.check_lm_head(config, [scheme], served.lm_head_bits)
        return
    check_quantized(scheme, config.dtype, "cpu" if used.vllm.cpu else "gpu")
    if served.lm_head_bits != 8:
        raise InputError("lm_head_bits is 4, which only the export onnxruntime stores; use 8")


def check_divisible(anatomy: Anatomy, served: Served) -> None:
    """Refuse a model that cannot be quantized or shared by the devices as asked. Raises InputError."""
    devices = served.tensor_parallel
    if faults := not_split(anatomy, devices):
        raise InputError(
            f"tensor_parallel is {devices}, which does not divide {'; '.join(faults)}; the model itself is timed, too, "
            "so choose a smaller one"
        )
    if served.scheme is not None:
        check_quantizable(anatomy, served.scheme, devices)


def as_served(source: Path, out: Path, served: Served) -> Path:
    """Return the checkpoint `source`, or one written to the new folder `out` if it is quantized to be served.

    Raises as `quantize_checkpoint`.
    """
    if served.scheme is None:
        return source
    quantize_checkpoint(source, served.scheme, out, torch.device("cpu"), lm_head_bits=served.lm_head_bits)
    return out


def opened_by(runtime: Runtime, sides: Mapping[str, Path], scratch: Path, timed: Iterable[Timed]) -> dict[str, Path]:
    """Return the checkpoints in the form that the runtime opens: as they are, or exported to `scratch` to be `timed`.

    Raises what the exporter raises.
    """
    # vLLM loads checkpoints in any precision.
    export_format = None if runtime.vllm else exported_as(runtime.name, [*sides.values()], runtime.dtype)
    if export_format is None:
        return dict(sides)
    engine = {}
    if export_format == "tensorrt":
        loads = [load for one in timed if isinstance(load := one.load(), Load)]
        engine["max_batch"] = max(ENGINE_BATCH, *(load.batch_size for load in loads))
        engine["max_length"] = max(ENGINE_LENGTH, *(load.positions for load in loads))
    for side, source in sides.items():
        export(source, scratch / side, export_format, dtype=runtime.dtype, **engine)
    return {side: scratch / side for side in sides}
