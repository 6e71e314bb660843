"""Eager PyTorch: runs a checkpoint folder, and is the reference for all other runtimes."""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache

from numprune.anatomy import read_anatomy
from numprune.errors import MissingRuntime
from numprune.export import checkpoint
from numprune.export.precision import DTYPES, FLOAT32
from numprune.export.runtimes.batch import extended_mask, prompt_mask
from numprune.placement import is_spread, place


def device_for(device: str, threads: int | None) -> torch.device:
    """Return the requested device, and set the threads of the whole process. Raises MissingRuntime."""
    if device == "cuda" and not torch.cuda.is_available():
        raise MissingRuntime(
            "device=cuda: this torch sees no CUDA device; install a CUDA build of torch, or use device=cpu"
        )
    if threads is not None:
        torch.set_num_threads(threads)
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


class TorchRuntime:
    """A checkpoint in `dtype`, one of `precision.DTYPES`, with transformers' own cache.

    Quantized layers round their inputs if their scheme does; without `rounds_inputs`, only the weights are rounded.
    """

    name = "torch"

    def __init__(
        self,
        folder: Path,
        *,
        device: str = "auto",
        threads: int | None = None,
        dtype: str = FLOAT32,
        rounds_inputs: bool = True,
    ) -> None:
        self.device = device_for(device, threads)
        self._dtype = dtype
        self.model = place(checkpoint.load(folder, DTYPES[dtype], rounds_inputs=rounds_inputs)[0], self.device)
        self.vocabulary: int = self.model.config.vocab_size
        self.context: int = self.model.config.max_position_embeddings
        self._mask: Tensor | None = None
        self._cache = DynamicCache(config=self.model.config)

    def prefill(self, tokens: Tensor, mask: Tensor | None = None, *, last_only: bool = False) -> Tensor:
        self._mask = prompt_mask(tokens, mask, self.vocabulary)
        self._cache = DynamicCache(config=self.model.config)
        return self._run(tokens, logits_to_keep=1 if last_only else 0)

    def decode(self, tokens: Tensor) -> Tensor:
        self._mask = extended_mask(self._mask, tokens, self.vocabulary)
        return self._run(tokens, logits_to_keep=1)[:, -1]

    def describe(self) -> dict[str, Any]:
        parameters = list(self.model.parameters())
        anatomy = read_anatomy(self.model.config)
        return {
            "runtime": self.name,
            "dtype": self._dtype,
            "mode": "eager",
            "device": self._devices(),
            "threads": torch.get_num_threads(),
            "attention": self.model.config._attn_implementation,
            "weight_bytes": sum(parameter.nbytes for parameter in parameters),
            "kv_bytes_per_token": sum(
                2 * DTYPES[self._dtype].itemsize * block.units * anatomy.head_dim
                for block in anatomy.of_kind("attention")
            ),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }

    @property
    def is_spread(self) -> bool:
        """Whether the model lies on several GPUs."""
        return is_spread(self.model)

    def _devices(self) -> str:
        if self.device.type != "cuda":
            return "cpu"
        count = len({parameter.device for parameter in self.model.parameters()})
        return f"{f'{count} x ' if count > 1 else ''}{torch.cuda.get_device_name()}"

    @torch.inference_mode()
    def _run(self, tokens: Tensor, *, logits_to_keep: int) -> Tensor:
        assert self._mask is not None
        positions = (self._mask.cumsum(dim=1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        # Without padding no mask is needed, and attention is faster without one.
        mask = None if self._mask.all() else self._mask.to(self.device)
        output = self.model(
            input_ids=tokens.to(self.device),
            attention_mask=mask,
            position_ids=positions.to(self.device),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=logits_to_keep,
        )
        logits: Tensor = output.logits
        return logits.to("cpu").float()
