"""TensorRT: runs a folder of `export.tensorrt` on its own stream; its buffers are torch CUDA tensors."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from numprune.errors import InputError, IntegrityError, MissingRuntime
from numprune.export import manifest, tensorrt
from numprune.export.precision import DTYPES
from numprune.export.runtimes.batch import extended_mask, prompt_mask


class TensorRTRuntime:
    """An engine with its execution context."""

    name = "tensorrt"

    def __init__(self, folder: Path, *, device: str = "auto") -> None:
        if device == "cpu":
            raise InputError("device=cpu: TensorRT runs on CUDA devices only")
        found = manifest.read(folder)
        if found.kind != "tensorrt":
            raise InputError(f"{folder}: holds {found.kind!r}, not an engine; run `numprune export … --to tensorrt`")
        self._trt = tensorrt.require()
        self._facts = dict(found.facts)
        if self._facts["tensorrt"] != self._trt.__version__ or self._facts["device"] != torch.cuda.get_device_name():
            raise MissingRuntime(
                f"{folder}: built with TensorRT {self._facts['tensorrt']} on {self._facts['device']}, but this machine "
                f"has {self._trt.__version__} and {torch.cuda.get_device_name()}; build the engine again here"
            )
        engine_file = folder / tensorrt.ENGINE_FILE
        logger = self._trt.Logger(self._trt.Logger.WARNING)
        self._engine = self._trt.Runtime(logger).deserialize_cuda_engine(engine_file.read_bytes())
        if self._engine is None:
            raise IntegrityError(f"{engine_file}: TensorRT cannot load it; build it again")
        self._context = self._engine.create_execution_context()
        self._stream = torch.cuda.Stream()  # on the default stream, TensorRT would synchronize at every call
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        self._past = {
            name: tuple(self._engine.get_tensor_shape(name)) for name in names if name.startswith("past_key_values.")
        }
        self._dtype = DTYPES[str(self._facts["dtype"])]  # of the KV cache; logits are float32
        self.vocabulary = int(tuple(self._engine.get_tensor_shape("logits"))[-1])
        self._weight_bytes = engine_file.stat().st_size
        self._cache: dict[str, Tensor] = {}
        self._mask: Tensor | None = None

    def prefill(self, tokens: Tensor, mask: Tensor | None = None, *, last_only: bool = False) -> Tensor:
        self._mask = prompt_mask(tokens, mask, self.vocabulary)
        rows, length = tokens.shape
        self._cache = {
            name: torch.empty(rows, shape[1], 0, shape[3], dtype=self._dtype, device="cuda")
            for name, shape in self._past.items()
        }
        return self._run(tensorrt.PREFILL, tokens, torch.arange(length - 1 if last_only else 0, length))

    def decode(self, tokens: Tensor) -> Tensor:
        self._mask = extended_mask(self._mask, tokens, self.vocabulary)
        return self._run(tensorrt.DECODE, tokens, torch.zeros(1, dtype=torch.int64))[:, 0]

    def describe(self) -> dict[str, Any]:
        return {
            "runtime": self.name,
            "dtype": self._facts["dtype"],
            "device": "cuda",
            "max_batch": self._facts["max_batch"],
            "max_length": self._facts["max_length"],
            "weight_bytes": self._weight_bytes,
            "kv_bytes_per_token": sum(self._dtype.itemsize * shape[1] * shape[3] for shape in self._past.values()),
            "versions": {"tensorrt": self._trt.__version__},
        }

    def _run(self, profile: int, tokens: Tensor, kept: Tensor) -> Tensor:
        assert self._mask is not None
        rows, total = self._mask.shape
        if rows > int(str(self._facts["max_batch"])) or total > int(str(self._facts["max_length"])):
            raise InputError(
                f"batch {rows} of {total} positions: the engine was built for at most {self._facts['max_batch']} of "
                f"{self._facts['max_length']}; build it with larger limits"
            )
        with torch.cuda.stream(self._stream):
            inputs = {"input_ids": tokens.cuda(), "attention_mask": self._mask.cuda(), "logits_to_keep": kept.cuda()}
            inputs |= self._cache
            self._context.set_optimization_profile_async(profile, self._stream.cuda_stream)
            for name, value in inputs.items():
                self._context.set_input_shape(name, tuple(value.shape))
                self._context.set_tensor_address(name, _address(value))
            outputs = {"logits": torch.empty(rows, len(kept), self.vocabulary, device="cuda")}
            for name, (_, heads, _, size) in self._past.items():
                present = name.replace("past_key_values", "present")
                outputs[present] = torch.empty(rows, heads, total, size, dtype=self._dtype, device="cuda")
            for name, value in outputs.items():
                self._context.set_tensor_address(name, value.data_ptr())
            if not self._context.execute_async_v3(self._stream.cuda_stream):
                raise IntegrityError(f"TensorRT refused to run {rows} rows of {total} positions; see its log")
            logits = outputs["logits"].cpu()
        self._stream.synchronize()
        self._cache = {name: outputs[name.replace("past_key_values", "present")] for name in self._past}
        return logits


_EMPTY: list[Tensor] = []


def _address(value: Tensor) -> int:
    """Return the tensor's address; TensorRT needs a non-null one for empty tensors, too."""
    if value.numel():
        return value.data_ptr()
    if not _EMPTY:
        _EMPTY.append(torch.empty(256, dtype=torch.uint8, device="cuda"))
    return _EMPTY[0].data_ptr()
