"""TensorRT engines, versions 10 and 11, built from the ONNX export on the GPU that will run them.

Networks are strongly typed: the precision is that of the graph, and TF32 is off. Each engine has two profiles, one for
the prompt (no past) and one for a single token after it. In both, past and new tokens add up to the length of the
attention mask, at the min, opt and max shapes.
"""

import importlib
import json
import tempfile
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from numprune.errors import InputError, MissingRuntime
from numprune.export import manifest, onnx
from numprune.export.precision import FLOAT32
from numprune.export.tasks import load_task

ENGINE_FILE = "model.engine"
LAYERS_FILE = "layers.json"  # written by the engine inspector: the kernels of the engine
TIMING_FILE = "timing.cache"  # makes later builds with the same GPU and TensorRT faster and reproducible

PREFILL, DECODE = 0, 1  # profile indices

# Opset 20: the parser has open bugs with opset 23's Attention, whose causal mask is also wrong with a past.
OPSET = 20


def export(
    source: Path,
    out: Path,
    *,
    max_batch: int = 8,
    max_length: int = 1024,
    workspace_gib: float = 4.0,
    timing_cache: Path | None = None,
    dtype: str = FLOAT32,
) -> manifest.Manifest:
    """Build an engine of the checkpoint `source` in the new folder `out`.

    Args:
        max_batch: largest batch size.
        max_length: largest number of positions, prompt and generated tokens together.
        workspace_gib: GPU memory that kernels may use while they run.
        timing_cache: of an earlier build on the same GPU.
        dtype: as for `onnx.export`.

    Raises:
        MissingRuntime: TensorRT or a CUDA device is missing; says what to install.
        InputError: `out` exists, the model is not a language model, a size is out of range, or TensorRT refuses the
            graph.
    """
    if max_batch < 1 or max_length < 2 or workspace_gib <= 0:
        raise InputError(
            f"max_batch={max_batch}, max_length={max_length}, workspace_gib={workspace_gib}: need at least 1, 2 and "
            "more than 0"
        )
    check_model(source)
    trt = require()
    facts: dict[str, JsonValue] = {
        "tensorrt": trt.__version__,
        "device": _device_name(),
        "dtype": dtype,
        "max_batch": max_batch,
        "max_length": max_length,
    }
    parents = {"checkpoint": manifest.folder_digest(source)}
    with (
        manifest.creating(out, kind="tensorrt", parents=parents, facts=facts) as folder,
        tempfile.TemporaryDirectory(dir=folder.parent) as scratch,
    ):
        graph = Path(scratch) / "onnx"
        onnx.export(source, graph, opset=OPSET, dtype=dtype)
        _build(trt, graph / onnx.MODEL_FILE, folder, max_batch, max_length, workspace_gib, timing_cache)
        (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    return manifest.read(out)


def check_model(source: Path) -> None:
    """Raises InputError unless the checkpoint `source` is of a language model."""
    if not load_task(source).prompted:
        raise InputError(
            f"{source}: engines can only be built for language models; export other models with --to onnx, for ONNX "
            "Runtime"
        )


def require() -> Any:
    """Return the module `tensorrt`. Raises MissingRuntime where it, its libraries or a CUDA device are missing."""
    try:
        trt = importlib.import_module("tensorrt")
    except ImportError as error:  # also if the bindings are installed and libnvinfer is not
        raise MissingRuntime(
            f"TensorRT is not installed ({error}); on a machine with an NVIDIA GPU: pip install 'numprune[tensorrt]'"
        ) from None
    import torch

    if not torch.cuda.is_available():
        raise MissingRuntime("TensorRT needs a CUDA device, and a CUDA build of torch that sees it; none was found")
    return trt


def profile_shapes(
    inputs: dict[str, tuple[int, ...]], profile: int, max_batch: int, max_length: int
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    """Return the (min, opt, max) shapes of every input of a profile.

    Args:
        inputs: the graph's, -1 where a dimension is dynamic.
        profile: `PREFILL` or `DECODE`.
    """
    if profile == PREFILL:
        sizes = [
            (batch, length, 0) for batch, length in ((1, 1), (1, max(1, max_length // 2)), (max_batch, max_length))
        ]
    else:
        lengths = (1, max(1, max_length // 2), max_length - 1)
        sizes = [(batch, 1, past) for batch, past in zip((1, 1, max_batch), lengths, strict=True)]
    return {name: _three(name, shape, sizes) for name, shape in inputs.items()}


def _three(name: str, shape: tuple[int, ...], sizes: list[tuple[int, int, int]]) -> Any:
    def at(batch: int, new: int, past: int) -> tuple[int, ...]:
        if name == "input_ids":
            return batch, new
        if name == "attention_mask":
            return batch, past + new
        if name == "logits_to_keep":
            return (new,)
        return batch, shape[1], past, shape[3]  # past_key_values.*: (B, KV heads, P, head dimension)

    # A prompt's first token needs only the last position, so at least one is kept.
    return tuple(at(*size) if name != "logits_to_keep" or index else (1,) for index, size in enumerate(sizes))


def _build(
    trt: Any,
    graph: Path,
    folder: Path,
    max_batch: int,
    max_length: int,
    workspace_gib: float,
    timing_cache: Path | None,
) -> None:
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        reasons = "; ".join(parser.get_error(index).desc() for index in range(parser.num_errors))
        raise InputError(f"{graph}: TensorRT {trt.__version__} cannot parse the graph: {reasons}")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(workspace_gib * (1 << 30)))
    config.clear_flag(trt.BuilderFlag.TF32)  # TF32 would cost three digits against the float32 reference
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    cache = config.create_timing_cache(timing_cache.read_bytes() if timing_cache else b"")
    config.set_timing_cache(cache, False)
    inputs = {network.get_input(i).name: tuple(network.get_input(i).shape) for i in range(network.num_inputs)}
    for index in (PREFILL, DECODE):
        profile = builder.create_optimization_profile()
        for name, (least, usual, most) in profile_shapes(inputs, index, max_batch, max_length).items():
            profile.set_shape(name, least, usual, most)
        config.add_optimization_profile(profile)
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise InputError(
            f"{graph}: TensorRT {trt.__version__} could not build an engine; see its log above (often too little GPU "
            f"memory for workspace_gib={workspace_gib})"
        )
    (folder / ENGINE_FILE).write_bytes(bytes(serialized))
    (folder / TIMING_FILE).write_bytes(bytes(config.get_timing_cache().serialize()))
    engine = trt.Runtime(logger).deserialize_cuda_engine(serialized)
    layers = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    (folder / LAYERS_FILE).write_text(json.dumps(json.loads(layers), indent=1) + "\n", encoding="utf-8")


def _device_name() -> str:
    import torch

    return torch.cuda.get_device_name()
