"""A transformer as its layers, one at a time: what pruning and everything else that walks a model needs of it.

What surrounds the layers is the model's own forward pass, run with something else in the layers' place: recorders, that
keep what each layer is called with, or a hidden state that is to leave the last one. So embeddings, positions, masks,
rotary tables, norms and the head are whatever the architecture has.

`ModelLayers` is a model in memory; export/streaming.py reads the same from a checkpoint's shards. Whoever walks cannot
tell which it is, except by what stays in memory.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from numprune.anatomy import family_of, read_anatomy
from numprune.blocks import Anatomy
from numprune.errors import InputError
from numprune.tasks import CAUSAL, Task

# Tokens (n, S) and hidden states (n, S, H) that leave the last layer -> the task's output (numprune.tasks.Task.output).
Head = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Arguments:
    """What the model calls one layer with besides the hidden states: masks, positions, rotary tables."""

    positional: tuple[Any, ...]
    named: Mapping[str, Any]

    def call(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """Run the layer: (n, S, H) -> (n, S, H)."""
        output: Tensor = layer(hidden, *self.positional, **self.named)
        return output


@dataclass(frozen=True)
class Entered:
    """A batch on the doorstep of the layers.

    Attributes:
        hidden: (n, S, H), what enters the first layer.
        arguments: of each layer.
    """

    hidden: Tensor
    arguments: tuple[Arguments, ...]


class Layers(Protocol):
    """A transformer whose layers can be had in any order.

    Attributes:
        task: that the model is for.
        device: where the modules are, and their inputs must be.
        dtype: that everything is computed in.
        resident: all layers are in memory, so that to come back to one costs nothing.
    """

    task: Task
    config: PreTrainedConfig
    anatomy: Anatomy
    device: torch.device
    dtype: torch.dtype
    resident: bool

    def enter(self, tokens: Tensor, mask: Tensor | None = None) -> Entered:
        """Return what token rows (n, S) bring to the layers, on `device`.

        Args:
            tokens: (n, S) int64.
            mask: (n, S), 1 = token, 0 = padding; None: no padding.
        """

    def layer(self, index: int) -> AbstractContextManager[nn.Module]:
        """Give the decoder layer for the duration of a `with` block, its parameters leaves that can have gradients.

        What is written into it lasts as long as the model does in memory, and no longer than the block where it is
        read from a checkpoint.
        """

    def head(self) -> AbstractContextManager[Head]:
        """Give what makes the model's output of the last layer's for the duration of a `with` block."""

    def allocate(self, *shape: int) -> Tensor:
        """Return room for the hidden states of all rows, in `dtype`, its values undefined: on `device`, or in a file.

        Whoever reads a batch of it moves the batch to `device`.
        """


class ModelLayers:
    """The layers of a model in memory: `layer` gives the model's own modules.

    Raises InputError when it is quantized, ValueError when its attention is not the one that its family is walked with.
    """

    resident = True

    def __init__(self, model: PreTrainedModel, task: Task = CAUSAL) -> None:
        if getattr(model.config, "quantization_config", None):
            raise InputError("the model is quantized; prune the unquantized checkpoint and quantize the result")
        family = family_of(model.config)
        found, wanted = model.config._attn_implementation, family.attention_implementation
        if found != wanted:
            raise ValueError(f"layers of {family.name} need attn_implementation={wanted!r}, not {found!r}")
        self.task = task
        self._model = model
        self.config: PreTrainedConfig = model.config
        self.anatomy = read_anatomy(model.config)
        self._layers: Any = model.get_submodule(self.anatomy.layers_path)
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype

    def enter(self, tokens: Tensor, mask: Tensor | None = None) -> Entered:
        return enter(self._model, self._layers, tokens.to(self.device), mask)

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        yield self._layers[index]

    @contextmanager
    def head(self) -> Iterator[Head]:
        yield lambda tokens, hidden: leave(self.task, self._model, self._layers, tokens.to(self.device), hidden)

    def allocate(self, *shape: int) -> Tensor:
        return torch.empty(*shape, dtype=self.dtype, device=self.device)


class CopiedLayers(ModelLayers):
    """The layers of a model in memory that stays as it is: `layer` gives a copy."""

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        yield copy.deepcopy(self._layers[index])


def enter(model: PreTrainedModel, layers: Sequence[nn.Module], tokens: Tensor, mask: Tensor | None) -> Entered:
    """Run `model`, whose decoder layers are `layers`, up to them; of the layers nothing is used."""
    entering: list[Tensor] = []
    arguments: list[Arguments] = []

    def record(hidden: Tensor, *positional: Any, **named: Any) -> Tensor:
        entering.append(hidden)
        arguments.append(Arguments(positional, named))
        return hidden

    mask = torch.ones_like(tokens) if mask is None else mask.to(tokens.device)
    with replaced(layers, record):
        model.base_model(input_ids=tokens, attention_mask=mask, use_cache=False)
    return Entered(entering[0], tuple(arguments))


def leave(
    task: Task,
    model: PreTrainedModel,
    layers: Sequence[nn.Module],
    tokens: Tensor,
    hidden: Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    """Return the output of `model` when `hidden` (n, S, H) leaves its layers; `mask` as in `enter`."""
    with replaced(layers, lambda *_, **__: hidden):
        return task.output(model, tokens, torch.ones_like(tokens) if mask is None else mask)


@contextmanager
def replaced(modules: Sequence[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """Have `forward` called in the place of each module's own forward pass."""
    for module in modules:
        module.forward = forward
    try:
        yield
    finally:
        for module in modules:
            del module.forward
