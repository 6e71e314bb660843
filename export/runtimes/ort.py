"""ONNX Runtime: runs a decoder's folder of `export.onnx` on the CPU or through its CUDA provider.

The KV cache stays where the runtime allocated it: the `present` values of one call are bound as `past` of the next.
Only tokens, mask and logits pass between Python and the runtime.
"""

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime as ort
import torch
from torch import Tensor

from numprune.errors import InputError, IntegrityError, MissingRuntime
from numprune.export import genai, manifest, onnx, processors
from numprune.export.onnx_graph import ELEMENTS
from numprune.export.precision import DTYPES
from numprune.export.runtimes.batch import extended_mask, prompt_mask

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"

# The heavy operators. On a GPU, shape arithmetic may run on the CPU; these may not.
_HEAVY = {
    "MatMul",
    "Gemm",
    "FusedMatMul",
    "Attention",
    "GroupQueryAttention",
    "MatMulNBits",
    "Softmax",
    "RMSNormalization",
    "SimplifiedLayerNormalization",
    "SkipSimplifiedLayerNormalization",
}
# Remedy for a kernel that the CUDA provider lacks, by kind of export.
_REMEDIES = {onnx.KIND: "export with opset=20", genai.KIND: "export with --to onnx"}


@dataclass(frozen=True)
class Opened:
    """A session over an exported graph. `device`: "cpu" or "cuda"; `threads`: None for the runtime's own default."""

    session: ort.InferenceSession
    device: str
    threads: int | None
    facts: Mapping[str, Any]
    weight_bytes: int

    @property
    def dtype(self) -> str:
        return str(self.facts["dtype"])

    def describe(self) -> dict[str, Any]:
        return {
            "dtype": self.dtype,
            "device": self.device,
            "provider": self.session.get_providers()[0],
            "threads": self.threads or "default",
            "flavour": self.facts["flavour"],
            "exporter": self.facts["exporter"],
            "opset": self.facts["opset"],
            **({"rounded": self.facts["rounded"]} if "rounded" in self.facts else {}),
            "weight_bytes": self.weight_bytes,
            "versions": {"onnxruntime": ort.__version__},
        }


def open_export(folder: Path, device: str, threads: int | None) -> Opened:
    """Return the graph of a folder written by `export.onnx` or `export.genai`. Raises like `open_runtime`."""
    found = manifest.read(folder)
    if found.kind not in _REMEDIES:
        raise InputError(
            f"{folder}: holds {found.kind!r}, not an ONNX export; run `numprune export … --to onnx`, or onnxruntime"
        )
    provider = choose_provider(device)
    threads = threads or processors.quota()
    session = _open(folder / onnx.MODEL_FILE, provider, threads)
    if provider == CUDA:
        _require_cuda(session, _REMEDIES[found.kind])
    weight_bytes = sum(entry.size for name, entry in found.files.items() if name.startswith(onnx.MODEL_FILE))
    return Opened(session, "cuda" if provider == CUDA else "cpu", threads, dict(found.facts), weight_bytes)


class OnnxRuntime:
    """An ONNX Runtime session over the exported graph."""

    name = "onnxruntime"

    def __init__(self, folder: Path, *, device: str = "auto", threads: int | None = None) -> None:
        self._opened = open_export(folder, device, threads)
        self._device, self._session = self._opened.device, self._opened.session
        self._element = ELEMENTS[DTYPES[self._opened.dtype]]
        shapes = {value.name: value.shape for value in self._session.get_inputs()}
        self._past = {name: shape for name, shape in shapes.items() if name.startswith("past_key_values.")}
        self._outputs = [value.name for value in self._session.get_outputs()]
        logits = self._session.get_outputs()[0]
        self.vocabulary = int(self._opened.facts.get(onnx.VOCABULARY, logits.shape[-1]))
        self._mask: Tensor | None = None
        self._cache: dict[str, ort.OrtValue] = {}

    def prefill(self, tokens: Tensor, mask: Tensor | None = None, *, last_only: bool = False) -> Tensor:
        self._mask = prompt_mask(tokens, mask, self.vocabulary)
        rows, length = tokens.shape
        self._cache = {
            name: ort.OrtValue.ortvalue_from_shape_and_type([rows, heads, 0, size], self._element, self._device)
            for name, (_, heads, _, size) in self._past.items()
        }
        return self._run(tokens, torch.arange(length - 1 if last_only else 0, length))

    def decode(self, tokens: Tensor) -> Tensor:
        self._mask = extended_mask(self._mask, tokens, self.vocabulary)
        return self._run(tokens, torch.zeros(1, dtype=torch.int64))[:, 0]

    def describe(self) -> dict[str, Any]:
        return {
            "runtime": self.name,
            **self._opened.describe(),
            "kv_bytes_per_token": sum(
                DTYPES[self._opened.dtype].itemsize * heads * size for _, heads, _, size in self._past.values()
            ),
        }

    def _run(self, tokens: Tensor, kept: Tensor) -> Tensor:
        assert self._mask is not None
        binding = self._session.io_binding()
        for name, value in (("input_ids", tokens), ("attention_mask", self._mask), ("logits_to_keep", kept)):
            binding.bind_cpu_input(name, value.contiguous().numpy())
        for name, past in self._cache.items():
            binding.bind_ortvalue_input(name, past)
        binding.bind_output(self._outputs[0], "cpu")
        for name in self._outputs[1:]:
            binding.bind_output(name, self._device)
        self._session.run_with_iobinding(binding)
        logits, *present = binding.get_outputs()
        self._cache = {
            name.replace("present", "past_key_values"): value
            for name, value in zip(self._outputs[1:], present, strict=True)
        }
        return torch.from_numpy(logits.numpy())


def choose_provider(device: str) -> str:
    """Return the execution provider for "cpu", "cuda" or "auto". Raises MissingRuntime."""
    available = CUDA in ort.get_available_providers()
    if device == "cuda" and not available:
        raise MissingRuntime(
            "device=cuda: this onnxruntime has no CUDA provider; install onnxruntime-gpu instead of onnxruntime, "
            "or use device=cpu"
        )
    if device == "cuda" or (device == "auto" and available and _cuda_device_count()):
        return CUDA
    return CPU


def _cuda_device_count() -> int:
    """Return the number of devices the driver sees; the installed torch may be built for the CPU only."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value


def _open(path: Path, provider: str, threads: int | None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.enable_mem_pattern = False  # it plans for each shape, and each decode step has a new one
    if threads is not None:
        options.intra_op_num_threads = threads
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    # TF32 would cost three digits against the float32 reference.
    providers = [(CUDA, {"use_tf32": "0"}), CPU] if provider == CUDA else [CPU]
    try:
        return ort.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # onnxruntime's exceptions have no common base class
        raise IntegrityError(f"{path}: ONNX Runtime cannot load it: {error}") from error


def _require_cuda(session: ort.InferenceSession, remedy: str) -> None:
    """Raise MissingRuntime if ONNX Runtime has silently moved the work to the CPU."""
    if session.get_providers()[0] != CUDA:
        raise MissingRuntime(
            f"ONNX Runtime fell back to {session.get_providers()[0]}: its CUDA provider did not start (see its log for "
            "the library that is missing; onnxruntime-gpu needs CUDA 13 and cuDNN 9), or use device=cpu"
        )
    strays = nodes_elsewhere(session, CUDA)
    if strays:
        raise MissingRuntime(
            f"ONNX Runtime would run {', '.join(strays)} on the CPU: its CUDA provider has no kernel for them; "
            f"{remedy}, or use device=cpu"
        )


def nodes_elsewhere(session: ort.InferenceSession, provider: str) -> list[str]:
    """Return the types of heavy operators that the session assigned to a provider other than `provider`."""
    parts = [part for part in session.get_provider_graph_assignment_info() if part.ep_name != provider]
    return sorted({node.op_type for part in parts for node in part.get_nodes()} & _HEAVY)
