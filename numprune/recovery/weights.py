"""What of a model is trained, and what it computes with then: all weights, or adapters beside them."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel


class Trained(Protocol):
    """Weights of a model in training. Names are those that they have in the model itself, without adapters."""

    def merged(self) -> dict[str, Tensor]:
        """Return what training has changed, as the model computes with it now; not to be written to."""

    def replaced(self, weights: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Have the model compute with these weights instead, for a while."""

    def finish(self, weights: Mapping[str, Tensor], rows: Tensor) -> None:
        """Leave the model with these weights.

        Raises IntegrityError where it would not compute the same on rows (n, S) with the weights that `merged` gives.
        """


class AllWeights:
    """Every weight of a model that requires a gradient."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}

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

    def finish(self, weights: Mapping[str, Tensor], rows: Tensor) -> None:
        self._assign(weights)

    @torch.no_grad()
    def _assign(self, weights: Mapping[str, Tensor]) -> None:
        for name, values in weights.items():
            self._weights[name].copy_(values)
