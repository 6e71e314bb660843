"""The runtimes of encoders, of text or images: one forward pass with the outputs of the model's task."""

from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor

from numprune.anatomy import read_anatomy
from numprune.errors import InputError
from numprune.export import checkpoint
from numprune.export.precision import DTYPES, FLOAT32
from numprune.export.runtimes import DEVICES
from numprune.export.runtimes.batch import check_images, encoder_mask
from numprune.export.runtimes.torch_eager import device_for
from numprune.export.tasks import load_task

NAMES = ("torch", "onnxruntime")


class Encoder(Protocol):
    """A model loaded into one runtime."""

    name: str
    vocabulary: int  # 0 if it reads images
    image: tuple[int, int, int] | None  # channels, height and width if it reads images
    tokens: int  # most of a text, or those of an image

    def forward(self, rows: Tensor, mask: Tensor | None = None) -> Tensor:
        """Run the model.

        Args:
            rows: tokens (B, S) int64, or images (B, C, height, width) float32.
            mask: of tokens, (B, S), 1 = token, 0 = padding on the right; None: no padding.

        Returns:
            Logits (B, S, V) of a masked language model, (B, classes) of a classifier, or embeddings (B, H), float32 on
            the CPU.
        """

    def describe(self) -> dict[str, Any]:
        """Plain JSON for a report: dtype, device, threads, versions, weight_bytes."""


def open_encoder(
    name: str, folder: Path, *, device: str = "auto", threads: int | None = None, dtype: str = FLOAT32
) -> Encoder:
    """Load `folder` into the runtime `name`. Arguments and errors are those of `open_runtime`."""
    if device not in DEVICES:
        raise InputError(f"device={device!r}: choose one of {', '.join(DEVICES)}")
    match name:
        case "torch":
            return TorchEncoder(folder, device=device, threads=threads, dtype=dtype)
        case "onnxruntime":
            from numprune.export.runtimes.ort_encoder import OnnxEncoder

            return OnnxEncoder(folder, device=device, threads=threads)
    raise InputError(f"runtime={name!r}: an encoder runs in {' or '.join(NAMES)}")


class TorchEncoder:
    """A checkpoint in `dtype`, in eager PyTorch; in float32, the reference for all other runtimes."""

    name = "torch"

    def __init__(self, folder: Path, *, device: str = "auto", threads: int | None = None, dtype: str = FLOAT32) -> None:
        self.device = device_for(device, threads)
        self._dtype = dtype
        self.model = checkpoint.load_model(folder, DTYPES[dtype]).to(self.device)
        self.task = load_task(folder)
        anatomy = read_anatomy(self.model.config)
        self.vocabulary, self.image, self.tokens = anatomy.vocabulary, anatomy.image, anatomy.context

    @torch.inference_mode()
    def forward(self, rows: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.image is None:
            checked = encoder_mask(rows, mask, self.vocabulary)
        else:
            check_images(rows, self.image)
            checked = rows.new_ones(len(rows), 1)  # not read
        return self.task.output(self.model, rows.to(self.device), checked.to(self.device)).float().cpu()

    def describe(self) -> dict[str, Any]:
        return {
            "runtime": self.name,
            "dtype": self._dtype,
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "attention": self.model.config._attn_implementation,
            "weight_bytes": sum(parameter.nbytes for parameter in self.model.parameters()),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }
