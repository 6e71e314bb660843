"""Run a checkpoint in float64, as the reference for float32 rounding errors."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel


class _KeepFloat64(TorchDispatchMode):
    """Turns casts to float32 into casts to float64: norms and rotary embeddings request float32 explicitly."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.ops.aten._to_copy.default and kwargs.get("dtype") is torch.float32:
            kwargs = {**kwargs, "dtype": torch.float64}
        return function(*args, **kwargs)


def in_float64(model: PreTrainedModel) -> None:
    """Prepare a float32 model for `run` and `logits`.

    Each module holds its own weights in float64 only while it runs, so peak memory grows by the largest matrix, not by
    the model.
    """
    for module in model.modules():
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if stored := [tensor for tensor in tensors if tensor.dtype == torch.float32]:
            _widen_while_running(module, stored)


def _widen_while_running(module: nn.Module, stored: list[Tensor]) -> None:
    narrow: list[Tensor] = []

    def before(*_: object) -> None:
        for tensor in stored:
            narrow.append(tensor.data)
            tensor.data = tensor.data.double()

    def after(*_: object) -> None:
        for tensor, data in zip(stored, narrow, strict=True):
            tensor.data = data
        narrow.clear()

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)


@torch.no_grad()  # not inference mode, in which casts do not reach the dispatch mode
def run(compute: Callable[[], Tensor]) -> Tensor:
    """Return the result of `compute` on the CPU, for a model prepared by `in_float64`."""
    with _KeepFloat64():
        return compute().cpu()


def logits(model: PreTrainedModel, tokens: Tensor, first: int = 0) -> Tensor:
    """Return the logits (S - first, V) of one sequence (S,), float64 on the CPU, for a model made by `in_float64`.

    `first`: position from which on they are computed; those of a long prompt can exceed memory.
    """
    kept = len(tokens) - first
    return run(
        lambda: model(input_ids=tokens[None].to(model.device), use_cache=False, logits_to_keep=kept).logits[0],
    )
