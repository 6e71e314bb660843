"""ONNX Runtime: runs an encoder's folder of `export.onnx` on the CPU or through its CUDA provider."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from numprune.anatomy import read_anatomy
from numprune.export.config import read_config
from numprune.export.runtimes import ort
from numprune.export.runtimes.batch import check_images, encoder_mask
from numprune.layers import PIXELS


class OnnxEncoder:
    """An ONNX Runtime session over the exported graph; only the task's output is computed."""

    name = "onnxruntime"

    def __init__(self, folder: Path, *, device: str = "auto", threads: int | None = None) -> None:
        opened = ort.open_export(folder, device, threads)
        self._opened = opened
        self._inputs = [value.name for value in opened.session.get_inputs()]
        outputs = [value.name for value in opened.session.get_outputs()]
        self._output = "logits" if "logits" in outputs else outputs[-1]
        anatomy = read_anatomy(read_config(folder))
        self.vocabulary, self.image, self.tokens = anatomy.vocabulary, anatomy.image, anatomy.context

    def forward(self, rows: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.image is None:
            checked = encoder_mask(rows, mask, self.vocabulary)
            values = {"input_ids": rows, "attention_mask": checked, "token_type_ids": torch.zeros_like(rows)}
        else:
            check_images(rows, self.image)
            values = {PIXELS: rows}
        fed = {name: values[name].numpy() for name in self._inputs}
        return torch.from_numpy(self._opened.session.run([self._output], fed)[0])

    def describe(self) -> dict[str, Any]:
        return {"runtime": self.name, **self._opened.describe()}
