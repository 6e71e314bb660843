"""The trained weights of a model: all of them, or adapters."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from numprune.anatomy import read_anatomy


class Trained(Protocol):
    """The trained weights of a model. Names are those of the model without adapters."""

    def merged(self) -> dict[str, Tensor]:
        """Return the trained weights as the model currently uses them; read-only."""

    def replaced(self, weights: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Temporarily let the model compute with these weights."""

    def check(self, rows: Tensor) -> None:
        """Raise IntegrityError unless the model computes the same on rows (n, S) with the weights of `merged`."""

    def finish(self, weights: Mapping[str, Tensor]) -> None:
        """Leave the model with these weights."""


class Weights:
    """The weights of a model, or of only some of its blocks; all others are frozen."""

    def __init__(self, model: PreTrainedModel, blocks: Collection[str] | None = None) -> None:
        """`blocks`: their names; None: everything is trained."""
        self._weights = dict(model.named_parameters())
        if blocks is not None:
            chosen = [block for block in read_anatomy(model.config).blocks if block.name in blocks]
            names = {f"{block.path}.{tensor}" for block in chosen for tensor in block.tensors()}
            for name, weight in self._weights.items():
                weight.requires_grad_(name in names)
            self._weights = {name: self._weights[name] for name in self._weights if name in names}

    def merged(self) -> dict[str, Tensor]:
        return {name: weight.detach() for name, weight in self._weights.items()}

    @contextmanager
    def replaced(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        own = {name: weight.detach().clone() for name, weight in self._weights.items()}
        self._assign(weights)
        try:
            yield
        finally:
            self._assign(own)

    def check(self, rows: Tensor) -> None:
        """They are the model's own."""

    def finish(self, weights: Mapping[str, Tensor]) -> None:
        self._assign(weights)

    @torch.no_grad()
    def _assign(self, weights: Mapping[str, Tensor]) -> None:
        for name, values in weights.items():
            self._weights[name].copy_(values)
