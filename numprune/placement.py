"""Place a model on a GPU, or spread it over several: each layer lies on one of them, and hidden states move.

accelerate decides where each module lies (`infer_auto_device_map`). Hooks in front of the modules move their inputs.
Its own `dispatch_model` is not used: it replaces the modules' forward passes, as pruning does (layers.py), and copies
of a layer would carry copies of a tied embedding.

Layers run one after another, so one GPU computes at a time. accelerate is an optional package, imported on use.
"""

import importlib.util
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from numprune.anatomy import read_anatomy
from numprune.errors import InputError

M = TypeVar("M", bound=PreTrainedModel)

_USABLE = 0.9  # of a GPU's memory, by models; the rest is for what they compute
_REMEDY = (
    "use more GPUs (processes of torchrun have one each); pruning with --stream (prune.stream) keeps only two layers "
    "in memory"
)


def place(model: M, device: torch.device, *, models: int = 1) -> M:
    """Return `model`, moved in place to `device`, or spread over all GPUs if it is one and too small.

    Args:
        model: in the CPU's memory.
        device: of a process that has one GPU of several (`cuda:1`), only that one is used.
        models: of this size that will be in memory at once.

    Raises:
        InputError: there is no GPU, the model does not fit them, or has to be spread and accelerate is not installed.
    """
    if device.type != "cuda":
        return model.to(device)
    gpus = [device] if device.index is not None else [torch.device("cuda", n) for n in range(torch.cuda.device_count())]
    if not gpus:
        raise InputError("device is cuda, and this torch sees no GPU; install a CUDA build of torch, or use the CPU")
    memory = {gpu: int(_USABLE * torch.cuda.get_device_properties(gpu).total_memory) for gpu in gpus}
    return placed(model, memory, models=models)


def placed(model: M, memory: Mapping[torch.device, int], *, models: int = 1) -> M:
    """Return `model`, moved in place to the first device, or spread over all if that has too little memory.

    Args:
        model: in the CPU's memory.
        memory: bytes for models by device.
        models: as for `place`.

    Raises:
        InputError: as `place`.
    """
    size, total = _size(model), sum(memory.values())
    first, *others = memory
    if size > total:
        where = f"{len(memory)} GPUs have" if others else f"{first} has"
        raise InputError(f"the model takes {_gib(size)}, and {where} {_gib(total)} for it; {_REMEDY}")
    if models * size <= memory[first] or not others:
        return model.to(first)
    if importlib.util.find_spec("accelerate") is None:
        if size <= memory[first]:  # as with a single GPU, more than one model is tried
            return model.to(first)
        raise InputError(
            f"{first} has {_gib(memory[first])}, too little for the model of {_gib(size)}; to spread layers over "
            f'{len(memory)} GPUs, install the package accelerate: pip install "numprune[learn]"; or {_REMEDY}'
        )
    _move(model, memory)
    if is_spread(model):
        connect(model)
    return model


def connect(model: PreTrainedModel) -> None:
    """Move the buffers of a spread model to its parameters, and its modules' inputs from now on.

    It returns its output on `model.device`, the device of its first parameter.
    """
    layers = {model.get_submodule(path) for path in read_anatomy(model.config).layer_paths}
    _connect(model, layers, model.device)
    model.register_forward_hook(_Returning(model.device))


def is_spread(model: nn.Module) -> bool:
    """Return whether the parameters of a model lie on several devices."""
    return len({parameter.device for parameter in model.parameters()}) > 1


class _Moving:
    """A hook in front of a module that moves its inputs to `device`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self, _: nn.Module, args: Any, kwargs: Any) -> Any:
        return self._moved(args), self._moved(kwargs)

    def _moved(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(self._device)
        if type(value) in (tuple, list):
            return type(value)(map(self._moved, value))
        return {key: self._moved(inner) for key, inner in value.items()} if type(value) is dict else value


class _Returning:
    """A hook behind a model that moves its output to `device`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self, _: nn.Module, __: Any, output: ModelOutput) -> None:
        for name, value in output.items():
            if isinstance(value, Tensor):
                output[name] = value.to(self._device)


def _move(model: PreTrainedModel, memory: Mapping[torch.device, int]) -> None:
    """Move the modules to devices chosen by accelerate. Raises InputError if there is no room."""
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    devices, modules = [*memory], dict(model.named_modules())
    # A module with parameters of its own uses them beside its children's.
    whole = {type(module).__name__ for module in modules.values() if _has_own(module) and [*module.children()]}
    whole |= {type(model.get_submodule(path)).__name__ for path in read_anatomy(model.config).layer_paths}
    unsplit = sorted(whole | {*(model._no_split_modules or ())})
    limits = get_balanced_memory(model, dict(enumerate(memory.values())), no_split_module_classes=unsplit)
    found = infer_auto_device_map(model, limits, no_split_module_classes=unsplit)
    if left := [name for name, number in found.items() if number == "disk"]:
        raise InputError(
            f"{len(devices)} GPUs have {_gib(sum(memory.values()))} for a model of {_gib(_size(model))}, and no place "
            f"for {left[0]} beside the rest; {_REMEDY}"
        )
    for name, number in found.items():
        if name in modules:
            modules[name].to(devices[number])


def _connect(module: nn.Module, layers: Collection[nn.Module], main: torch.device) -> None:
    devices = {parameter.device for parameter in module.parameters()}
    children = [*module.children()]
    if len(devices) <= 1 and (module in layers or not children or _has_own(module)):
        tensors = [*module.parameters(), *module.buffers()]
        if tensors:
            where = devices.pop() if devices else main
            module.to(where).register_forward_pre_hook(_Moving(where), with_kwargs=True)
        return
    for name, buffer in [*module.named_buffers(recurse=False)]:
        setattr(module, name, buffer.to(main))
    for child in children:
        _connect(child, layers, main)


def _has_own(module: nn.Module) -> bool:
    """Return whether a module has parameters that are none of its children's."""
    return next(module.parameters(recurse=False), None) is not None


def _size(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in {*model.parameters(), *model.buffers()})


def _gib(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB"
