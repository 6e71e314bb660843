"""LoRA: low-rank updates of the projections of the layers instead of all weights, by peft (Hu et al., ICLR 2022)."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from numprune.anatomy import layers_path
from numprune.errors import IntegrityError
from numprune.tasks import CAUSAL, Task

_ADAPTER = "default"
_SCALE = 2  # of the update B A: peft's alpha divided by the rank
_FLOOR = 1e-5  # relative to the largest logit: allowed change by merging, and
_FACTOR = 10  # times the effect of rounding the merged weights once more, which grows with the depth of the model


class Adapters:
    """Adapters of every projection in the layers of a model (`weights.Trained`); everything else is frozen.

    Routed experts have none, because they are not Linear layers. The adapters are part of `model` until `finish`.
    """

    def __init__(self, model: PreTrainedModel, rank: int, seed: int, task: Task = CAUSAL) -> None:
        from peft import LoraConfig, LoraModel

        path = layers_path(model.config)
        names = [
            f"{path}.{name}"
            for name, module in model.get_submodule(path).named_modules()
            if isinstance(module, nn.Linear | Conv1D)
        ]
        transposed = any(isinstance(model.get_submodule(name), Conv1D) for name in names)
        config = LoraConfig(r=rank, lora_alpha=_SCALE * rank, target_modules=names, fan_in_fan_out=transposed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._tuner = LoraModel(model, config, _ADAPTER)
        self._model, self._task = model, task
        self._layers = {f"{name}.weight": model.get_submodule(name) for name in names}

    @torch.no_grad()
    def merged(self) -> dict[str, Tensor]:
        return {
            name: layer.base_layer.weight + layer.get_delta_weight(_ADAPTER) for name, layer in self._layers.items()
        }

    @contextmanager
    def replaced(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        own = {name: layer.base_layer.weight.detach().clone() for name, layer in self._layers.items()}
        self._assign(weights, adapted=False)
        try:
            yield
        finally:
            self._assign(own, adapted=True)

    def finish(self, weights: Mapping[str, Tensor]) -> None:
        self._assign(weights, adapted=False)
        self._tuner.unload()

    @torch.no_grad()
    def check(self, rows: Tensor) -> None:
        merged = self.merged()
        apart = self._output(rows)
        together = self._merged_logits(merged, rows)
        # Merging rounds each weight once, so the limit is relative to the change of logits by rounding each once more.
        rounded = {
            name: weight * (1 + torch.finfo(weight.dtype).eps * _signs(weight)) for name, weight in merged.items()
        }
        scale = apart.abs().max()
        noise = float((self._merged_logits(rounded, rows) - together).abs().max() / scale)
        limit = max(_FLOOR, _FACTOR * noise)
        error = float((apart - together).abs().max() / scale)
        if not error <= limit:
            raise IntegrityError(
                f"merging the adapters changes logits by {error:.1e} of the largest, more than {limit:.1e}; choose a "
                "lower learning rate or rank"
            )

    def _merged_logits(self, weights: Mapping[str, Tensor], rows: Tensor) -> Tensor:
        with self.replaced(weights):
            return self._output(rows)

    def _output(self, rows: Tensor) -> Tensor:
        return self._task.output(self._model, rows, torch.ones_like(rows))

    @torch.no_grad()
    def _assign(self, weights: Mapping[str, Tensor], *, adapted: bool) -> None:
        for name, layer in self._layers.items():
            layer.base_layer.weight.copy_(weights[name])
            layer.enable_adapters(adapted)


def _signs(weight: Tensor) -> Tensor:
    """Return alternating 1 and -1 in the shape of a weight."""
    return 1 - 2 * (torch.arange(weight.numel(), device=weight.device) % 2).view_as(weight)
