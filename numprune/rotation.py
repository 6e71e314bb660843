"""Rotate a model's residual stream without changing what the model computes.

An RMS norm without a gain commutes with orthogonal maps. So every gain is folded into the matrices that read the norm's
output, embeddings and everything that writes to the stream are multiplied by Q, and everything that reads it undoes
that (SliceGPT; Ashkboos et al. 2024, arXiv 2401.15024, section 3.2, with one Q for the whole model).

The last norm's gain goes into the output matrix, which can then no longer be the embedding's: a tied one is untied.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from numprune.blocks import Block
from numprune.hidden import inputs_of, norm_of, outputs_of
from numprune.layers import Entered, Head, Layers, device_of


class RotatedLayers:
    """The layers of a model whose residual stream is multiplied by Q (numprune.layers.Layers). `layer` yields a copy.

    Args:
        layers: of a model that `hidden.check_narrowable` accepts.
        rotation: Q, (H, H) float64, orthogonal.
    """

    def __init__(self, layers: Layers, rotation: Tensor) -> None:
        self._layers = layers
        self._rotation = rotation.to(layers.device)
        self.anatomy, self.config = layers.anatomy.untied(), layers.config
        self.task, self.processes, self.resident = layers.task, layers.processes, layers.resident
        self.device, self.dtype = layers.device, layers.dtype
        self._kept: dict[int, nn.Module] = {}  # rotated layers, if all are in memory anyway

    def enter(self, tokens: Tensor, mask: Tensor | None = None) -> Entered:
        entered = self._layers.enter(tokens, mask)
        return Entered(self._turned(entered.hidden, self._rotation), entered.arguments)

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        turned = self._kept.get(index)
        if turned is None:
            with self._layers.layer(index) as layer:
                turned = copy.deepcopy(layer)
            rotate(turned, self.anatomy.of_layer(index), self._rotation.to(device_of(turned, self.device)))
        if self.resident:
            self._kept[index] = turned
            turned = copy.deepcopy(turned)
        yield turned

    @contextmanager
    def head(self) -> Iterator[Head]:
        with self._layers.head() as head:
            yield lambda tokens, hidden: head(tokens, self._turned(hidden, self._rotation.T))

    def allocate(self, *shape: int, near: int | None = None) -> Tensor:
        return self._layers.allocate(*shape, near=near)

    @staticmethod
    def _turned(hidden: Tensor, rotation: Tensor) -> Tensor:
        return (hidden.double() @ rotation).to(hidden.dtype)


@torch.no_grad()
def rotate(layer: nn.Module, blocks: Sequence[Block], rotation: Tensor) -> None:
    """Rotate a layer in place; `blocks`: all of it, `rotation`: (H, H) float64."""
    present = [block for block in blocks if block.units]
    for block in present:
        gain = layer.get_parameter(f"{norm_of(present, block)}.weight").double()
        for name, dim in inputs_of(block).items():
            _multiply(layer.get_parameter(name), dim, gain[:, None] * rotation)
        for parameter, dim in outputs_of(layer, block):
            _multiply(parameter, dim, rotation)
    for block in present:
        for name in block.norms:
            layer.get_parameter(name).fill_(1)


def _multiply(parameter: Tensor, dim: int, matrix: Tensor) -> None:
    """Multiply (H, H) `matrix` from the right along dimension `dim` of a parameter, in place."""
    parameter.copy_((parameter.movedim(dim, -1).double() @ matrix).movedim(-1, dim))
