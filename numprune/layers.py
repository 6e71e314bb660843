"""A transformer as its layers, one at a time: the interface of pruning and of every other pass over a model.

Everything around the layers is the model's own forward pass, run with the layers replaced: by recorders of their
arguments, or by a hidden state to leave the last layer. So embeddings, positions, masks, rotary tables, norms and the
head are those of the architecture.

`ModelLayers` is a model in memory; export/streaming.py reads the same from a checkpoint's shards. Callers only notice
the difference in memory use.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from numprune.anatomy import family_of, read_anatomy
from numprune.blocks import Anatomy, Block
from numprune.errors import InputError
from numprune.processes import ALONE, Processes
from numprune.tasks import CAUSAL, Task

# Rows (n, …) and hidden states (n, S, H) that leave the last layer -> the task's output (numprune.tasks.Task.output).
Head = Callable[[Tensor, Tensor], Tensor]

PIXELS = "pixel_values"  # transformers' name of the input of models whose rows are images


@dataclass(frozen=True)
class Arguments:
    """A layer's arguments other than the hidden states: masks, positions, rotary tables.

    Attributes:
        merging: what merges the tokens that leave the layer before, if this one begins a stage.
    """

    positional: tuple[Any, ...]
    named: Mapping[str, Any]
    merging: Callable[[Tensor], Tensor] | None = None

    def merged(self, hidden: Tensor) -> Tensor:
        """Return what the layer reads, (n, S, H), of what leaves the one before."""
        return hidden if self.merging is None else self.merging(hidden)

    def call(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """Run the layer: (n, S, H) -> (n, S, H)."""
        output = layer(hidden, *self.positional, **self.named)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result


@dataclass(frozen=True)
class Entered:
    """A batch in front of the first layer.

    Attributes:
        hidden: (n, S, H), input of the first layer.
        arguments: of each layer.
    """

    hidden: Tensor
    arguments: tuple[Arguments, ...]


class Layers(Protocol):
    """A transformer whose layers can be accessed in any order.

    Attributes:
        task: of the model.
        processes: that share the rows, each with all layers.
        device: of the rows, and of hidden states between the layers. A model in memory may have layers on others.
        dtype: of all computations.
        resident: all layers are in memory, so returning to one costs nothing.
    """

    task: Task
    processes: Processes
    config: PreTrainedConfig
    anatomy: Anatomy
    device: torch.device
    dtype: torch.dtype
    resident: bool

    def enter(self, tokens: Tensor, mask: Tensor | None = None) -> Entered:
        """Return the input of the first layer and all layers' arguments for rows, on `device`.

        Args:
            tokens: (n, S) int64, or images (n, C, height, width).
            mask: (n, S), 1 = token, 0 = padding; None: no padding.
        """

    def layer(self, index: int) -> AbstractContextManager[nn.Module]:
        """Yield the decoder layer; its parameters are leaves that can have gradients. Layer scales are 1 (`unscale`).

        Changes to it persist if the model is in memory, and are lost after the `with` block if it is read from a
        checkpoint.
        """

    def head(self) -> AbstractContextManager[Head]:
        """Yield the function that turns the last layer's output into the model's."""

    def allocate(self, *shape: int, near: int | None = None) -> Tensor:
        """Return an uninitialized buffer for the hidden states of all rows, in `dtype`, on `device` or in a file.

        The caller moves each batch it reads to the device of the layer that reads it, or for the head to `device`.

        Args:
            near: the layer that a buffer for something else belongs to: on its device.
        """


class ModelLayers:
    """The layers of a model in memory: `layer` yields the model's own modules, once it has moved their layer scales.

    Raises InputError if it is quantized, ValueError if it does not have the attention implementation of its family.
    """

    resident = True

    def __init__(self, model: PreTrainedModel, task: Task = CAUSAL, processes: Processes = ALONE) -> None:
        if getattr(model.config, "quantization_config", None):
            raise InputError("the model is quantized; prune the unquantized checkpoint and quantize the result")
        family = family_of(model.config)
        found, wanted = model.config._attn_implementation, family.attention_implementation
        if found != wanted:
            raise ValueError(f"layers of {family.name} need attn_implementation={wanted!r}, not {found!r}")
        self.task, self.processes = task, processes
        self._model = model
        self.config: PreTrainedConfig = model.config
        self.anatomy = read_anatomy(model.config)
        self._layers = [model.get_submodule(path) for path in self.anatomy.layer_paths]
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype

    def enter(self, tokens: Tensor, mask: Tensor | None = None) -> Entered:
        return enter(self._model, self.anatomy, tokens.to(self.device), mask)

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        yield unscale(self._layers[index], self.anatomy.of_layer(index))

    @contextmanager
    def head(self) -> Iterator[Head]:
        yield lambda tokens, hidden: leave(self.task, self._model, self.anatomy, tokens.to(self.device), hidden)

    def allocate(self, *shape: int, near: int | None = None) -> Tensor:
        device = self.device if near is None else device_of(self._layers[near], self.device)
        return torch.empty(*shape, dtype=self.dtype, device=device)


class CopiedLayers(ModelLayers):
    """The layers of a model in memory that must not change: `layer` yields a copy."""

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        yield unscale(copy.deepcopy(self._layers[index]), self.anatomy.of_layer(index))


def device_of(layer: nn.Module, otherwise: torch.device) -> torch.device:
    """Return the device of a layer; `otherwise`: if nothing is left in it."""
    return next((parameter.device for parameter in layer.parameters()), otherwise)


@torch.no_grad()
def unscale(layer: nn.Module, blocks: Iterable[Block]) -> nn.Module:
    """Move the layer scales of `blocks` into the consumers before them, in place, and return the layer.

    The layer computes the same. What is measured or fitted at a consumer's output is then in units of the residual
    stream, and a factor of 0 divides nothing.
    """
    for block in blocks:
        if block.scale is not None and block.units:
            scale = layer.get_parameter(block.scale)
            weight = layer.get_parameter(block.reader.tensor)
            weight.mul_(scale[:, None] if block.reader.dim == 1 else scale)
            if block.consumer_bias:
                layer.get_parameter(f"{block.consumer}.bias").mul_(scale)
            scale.fill_(1)
    return layer


def enter(model: PreTrainedModel, anatomy: Anatomy, tokens: Tensor, mask: Tensor | None) -> Entered:
    """Run `model` up to its layers; the layers themselves are not run."""
    entering: list[Tensor] = []
    arguments: list[Arguments] = []
    mergings: list[Callable[[Tensor], Tensor]] = []

    def record(hidden: Tensor, *positional: Any, **named: Any) -> Any:
        entering.append(hidden)
        arguments.append(Arguments(positional, named, mergings.pop() if mergings else None))
        return passed(model, hidden)

    def record_merging(module: nn.Module, args: tuple[Any, ...]) -> None:
        mergings.append(lambda hidden: module(hidden, *args[1:]))

    layers = [model.get_submodule(path) for path in anatomy.layer_paths]
    with replaced(layers, record), ExitStack() as stack:
        for path in anatomy.mergings.values():
            stack.callback(model.get_submodule(path).register_forward_pre_hook(record_merging).remove)
        model.base_model(**named_inputs(model, tokens, mask))
    return Entered(entering[0].to(tokens.device), tuple(arguments))


def named_inputs(model: PreTrainedModel, rows: Tensor, mask: Tensor | None = None) -> dict[str, Any]:
    """Return the arguments of a base model for rows, on their device; `mask` as in `Layers.enter`."""
    if model.main_input_name == PIXELS:
        return {PIXELS: rows}
    mask = torch.ones_like(rows) if mask is None else mask.to(rows.device)
    return {"input_ids": rows, "attention_mask": mask, "use_cache": False}


def leave(
    task: Task,
    model: PreTrainedModel,
    anatomy: Anatomy,
    tokens: Tensor,
    hidden: Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    """Return the output of `model` when `hidden` (n, S, H) leaves its last layer; `mask` as in `enter`."""
    *before, last = (model.get_submodule(path) for path in anatomy.layer_paths)
    passing = replaced(before, lambda entering, *_, **__: passed(model, entering))
    with passing, replaced([last], lambda *_, **__: passed(model, hidden)):
        return task.output(model, tokens, torch.ones_like(tokens) if mask is None else mask)


def passed(model: PreTrainedModel, hidden: Tensor) -> Any:
    """Return hidden states in the form in which the layers of `model` return them."""
    return (hidden, None) if family_of(model.config).returns_tuple else hidden


@contextmanager
def replaced(modules: Sequence[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """Replace each module's forward pass by `forward`."""
    for module in modules:
        module.forward = forward
    try:
        yield
    finally:
        for module in modules:
            del module.forward
