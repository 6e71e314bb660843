"""The inputs of the down projections of a layer's experts, and their moments."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from numprune.blocks import Block
from numprune.moments import Moments
from numprune.processes import Processes
from numprune.slices import Kept

_SAMPLE = 1024  # tokens for comparing experts: every expert is run on each of them


@dataclass(frozen=True)
class Routed:
    """Tokens in front of the experts, as routed by the layer.

    Attributes:
        hidden: (T, H).
        experts: (T, k) int64.
        weights: (T, k).
    """

    hidden: Tensor
    experts: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Share:
    """One expert's part of a batch.

    Attributes:
        expert: its index.
        tokens: (n,) those that are routed to it.
        inputs: (n, D), of its down projection, weighted: D = I, or I + 1 with the routing weight last.
    """

    expert: int
    tokens: Tensor
    inputs: Tensor


class Experts:
    """The experts of a decoder layer.

    Attributes:
        module: transformers'.
        down: (E, H, I), a view of their down projections.
        bias: (E, H), or None.
    """

    def __init__(self, layer: nn.Module, block: Block) -> None:
        self.module: Any = layer.get_submodule(block.consumer)
        reader, writer = block.reader, block.writers[0]
        self._up = outputs_first(layer.get_parameter(writer.tensor).detach(), writer.dim == 1)
        self.down = outputs_first(layer.get_parameter(reader.tensor).detach(), reader.dim == 2)
        biases = dict(self.module.named_parameters())
        self._up_bias, self.bias = (
            biases[name].detach() if (name := f"{part.tensor.rpartition('.')[2]}_bias") in biases else None
            for part in (writer, reader)
        )

    def __len__(self) -> int:
        return len(self.down)

    @property
    def weights(self) -> Tensor:
        """(E, H, D), a copy: the down projections, their biases as the last column."""
        return self.down.clone() if self.bias is None else torch.cat([self.down, self.bias[..., None]], 2)

    def put(self, kept: Kept, weights: Tensor) -> None:
        """Overwrite the kept part of the down projections and their biases, (K, H, M) or (K, H, M + 1)."""
        channels = kept.members.shape[1]
        self.down[kept.units[:, None], :, kept.members] = weights[..., :channels].mT.to(self.down)
        if self.bias is not None:
            self.bias[kept.units] = weights[..., channels].to(self.bias)

    def shares(self, routed: Routed) -> Iterator[Share]:
        """Yield the part of the batch of each expert to which tokens are routed."""
        for expert in routed.experts.unique().tolist():
            tokens, place = (routed.experts == expert).nonzero(as_tuple=True)
            weights = routed.weights[tokens, place, None]
            bias = None if self._up_bias is None else self._up_bias[expert]
            inner = self.module._apply_gate(nn.functional.linear(routed.hidden[tokens], self._up[expert], bias))
            inputs = weights * inner
            yield Share(expert, tokens, inputs if self.bias is None else torch.cat([inputs, weights], 1))

    def outputs(self, hidden: Tensor) -> Tensor:
        """Return every expert's output for every token with routing weight 1: (T, H) -> (T, E, H)."""
        ones = hidden.new_ones(len(hidden), 1)
        every = (torch.full_like(ones, expert, dtype=torch.long) for expert in range(len(self)))
        return torch.stack([self.module(hidden, expert, ones) for expert in every], 1)


class Seen:
    """Statistics of the experts of a layer.

    Their moments take E * I^2 values in float64.

    Attributes:
        moments: of each expert's weighted inner values p_e a_e, (I,), over all tokens; zero for tokens routed
            elsewhere.
        weight: (E,) float64, the sums of the routing weights.
    """

    def __init__(self, experts: Experts, tokens: int, first: int = 0) -> None:
        """
        Args:
            tokens: number of tokens that all processes will add.
            first: number of tokens before those that this process adds.
        """
        count, _, channels = experts.down.shape
        device = experts.down.device
        self._experts = experts
        self.moments = [Moments(channels, device=device) for _ in range(count)]
        self.weight = torch.zeros(count, dtype=torch.float64, device=device)
        self._stride = max(1, tokens // _SAMPLE)
        self._every, self._first = tokens, first
        self._tokens = first
        self._hidden: list[Tensor] = []

    def add(self, routed: Routed) -> None:
        """Add a batch."""
        self.weight.index_add_(0, routed.experts.flatten(), routed.weights.flatten().double())
        here = len(routed.hidden)
        left = dict.fromkeys(range(len(self.moments)), here)
        for share in self._experts.shares(routed):
            moments = self.moments[share.expert]
            moments.add(share.inputs[:, : moments.channels])
            left[share.expert] -= len(share.tokens)
        for expert, tokens in left.items():
            self.moments[expert].add_zeros(tokens)
        self._hidden.append(routed.hidden[-self._tokens % self._stride :: self._stride].clone())
        self._tokens += here

    def add_up(self, processes: Processes) -> None:
        """Add everything that the other processes have added to theirs. Raises ProcessError."""
        if processes.count == 1:
            return
        for moments in self.moments:
            moments.add_up(processes)
        own, start = self.sample, -(-self._first // self._stride)
        sample = own.new_zeros(-(-self._every // self._stride), own.shape[1])
        sample[start : start + len(own)] = own
        processes.add_up(self.weight, sample)
        self._hidden = [sample]

    @property
    def sample(self) -> Tensor:
        """Return the inputs (n, H) of the experts for up to 2 * 1024 tokens, evenly spaced."""
        return torch.cat(self._hidden)


def outputs_first(weight: Tensor, is_so: bool) -> Tensor:
    """Return stacked matrices (E, outputs, inputs), a view if they are stored transposed."""
    return weight if is_so else weight.mT
