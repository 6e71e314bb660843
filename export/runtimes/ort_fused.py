"""ONNX Runtime: runs a decoder's folder of `export.genai`, with past and present in one KV buffer.

Each step updates the buffer in place: returning a new cache would copy it with every token.
"""

from pathlib import Path
from typing import Any

import onnxruntime as ort
import torch
from torch import Tensor
from torch.nn.functional import pad

from numprune.errors import InputError
from numprune.export.config import read_config
from numprune.export.genai import check_precision
from numprune.export.onnx_graph import ELEMENTS
from numprune.export.precision import DTYPES
from numprune.export.runtimes.batch import check_next, prompt_mask
from numprune.export.runtimes.ort import open_export

ROOM = 256  # spare positions after the prompt; the buffer doubles when they are used up


class FusedOnnxRuntime:
    """A session whose graph takes rows padded on the right and computes the logits of each row's last token."""

    name = "onnxruntime"

    def __init__(self, folder: Path, *, device: str = "auto", threads: int | None = None) -> None:
        self._opened = open_export(folder, device, threads)
        self._dtype = DTYPES[self._opened.dtype]
        check_precision(self._opened.dtype, self._opened.device)
        self._session = self._opened.session
        self._binding = self._session.io_binding()
        shapes = {value.name: value.shape for value in self._session.get_inputs()}
        self._sizes = {name: shape[1::2] for name, shape in shapes.items() if name.startswith("past_key_values.")}
        self._context: int = read_config(folder).max_position_embeddings
        self.vocabulary: int = self._session.get_outputs()[0].shape[-1]
        self._buffers: dict[str, ort.OrtValue] = {}
        self._room = (0, 0)  # rows and positions of each buffer
        self._logits = torch.empty(0, 1, self.vocabulary)  # of all rows, written by each run
        self._lengths: Tensor | None = None  # (B,): tokens of each row
        self._total = 0  # T: positions in use

    def prefill(self, tokens: Tensor, mask: Tensor | None = None, *, last_only: bool = False) -> Tensor:
        mask = prompt_mask(tokens, mask, self.vocabulary)
        lengths, width = mask.sum(1), tokens.shape[1]
        tokens = tokens.gather(1, mask.argsort(dim=1, descending=True, stable=True))  # the padding to the right
        if last_only:
            return self._start(tokens, lengths)
        # The graph outputs one position per row: each position is computed as the last one of a prompt that ends there.
        logits = torch.zeros(len(tokens), width, self.vocabulary)
        for end in range(1, width + 1):
            found = self._start(tokens[:, :end], lengths.clamp(max=end))[:, 0]
            whole = end <= lengths
            logits[whole, (width - lengths + end - 1)[whole]] = found[whole]
        return logits

    def decode(self, tokens: Tensor) -> Tensor:
        check_next(tokens, None if self._lengths is None else len(self._lengths), self.vocabulary)
        assert self._lengths is not None
        if self._total == self._room[1]:
            self._grow()
        self._lengths = self._lengths + 1
        self._total += 1
        return self._run(tokens)[:, 0]

    def describe(self) -> dict[str, Any]:
        return {
            "runtime": self.name,
            **self._opened.describe(),
            "kv_bytes_per_token": sum(self._dtype.itemsize * heads * size for heads, size in self._sizes.values()),
        }

    def _start(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        rows, width = tokens.shape
        self._require(width)
        if rows != self._room[0] or width > self._room[1]:
            # Old content of a buffer is overwritten, or lies beyond the length of its row.
            positions, element = self._limited(width + ROOM), ELEMENTS[self._dtype]
            self._bind(
                {
                    name: ort.OrtValue.ortvalue_from_shape_and_type(
                        [rows, heads, positions, size], element, self._opened.device
                    )
                    for name, (heads, size) in self._sizes.items()
                }
            )
        self._lengths, self._total = lengths, width
        return self._run(tokens)

    def _grow(self) -> None:
        self._require(self._total + 1)
        more = self._limited(2 * self._total) - self._total
        self._bind(
            {
                name: ort.OrtValue.from_dlpack(pad(torch.from_dlpack(value), (0, 0, 0, more)))
                for name, value in self._buffers.items()
            }
        )
        if self._opened.device == "cuda":
            torch.cuda.synchronize()  # ONNX Runtime reads the buffers on its own stream

    def _limited(self, positions: int) -> int:
        return min(positions, self._context)

    def _require(self, positions: int) -> None:
        if positions > self._context:
            raise InputError(f"{positions} positions exceed the model's max_position_embeddings={self._context}")

    def _bind(self, buffers: dict[str, ort.OrtValue]) -> None:
        """Bind these buffers as both past and present."""
        self._buffers = buffers
        rows, _, positions, _ = next(iter(buffers.values())).shape()
        self._room = (rows, positions)
        for name, value in buffers.items():
            self._binding.bind_ortvalue_input(name, value)
            self._binding.bind_ortvalue_output(name.replace("past_key_values", "present"), value)
        self._logits = torch.empty(self._room[0], 1, self.vocabulary)
        self._binding.bind_ortvalue_output("logits", ort.OrtValue.from_dlpack(self._logits))

    def _run(self, tokens: Tensor) -> Tensor:
        assert self._lengths is not None
        mask = (torch.arange(self._total) < self._lengths[:, None]).long()
        self._binding.bind_cpu_input("input_ids", tokens.contiguous().numpy())
        self._binding.bind_cpu_input("attention_mask", mask.numpy())
        self._session.run_with_iobinding(self._binding)
        return self._logits.clone()
