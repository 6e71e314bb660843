"""Quantize one block by GPTQ, given its inputs and desired outputs."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from numprune.blocks import Block
from numprune.calibration import Stream, Walker
from numprune.compensation import choose_damping, refit
from numprune.inputs import split_rows
from numprune.moments import Moments
from numprune.options import PruneOptions
from numprune.quantization.gptq import gptq
from numprune.quantization.linears import Projections, linear_of, projections
from numprune.quantization.rounding import Quantized, round_inputs_of
from numprune.quantization.schemes import Scheme


@dataclass(frozen=True)
class BlockFit:
    """The inputs and desired outputs of a model's blocks, in the order of the forward pass.


    Attributes:
        walker: over the model.
        stream: its hidden states before the block.
        aims: (N, S, H), the desired output of the block.
        dtype: stored data type of group scales.
    """

    walker: Walker
    stream: Stream
    aims: Tensor
    dtype: torch.dtype

    def quantize(self, layer: nn.Module, block: Block, scheme: Scheme | None) -> dict[str, Quantized]:
        """Quantize a block of its layer, in place; return its matrices by path.

        The last projection is fitted to the aims, then rounded with the same second moments. Without a scheme it is
        only fitted. The stream stays before the block.
        """
        writers, reader = projections(block)
        quantized: dict[str, Quantized] = {}
        if scheme is not None:
            for path in (*writers.paths, *reader.paths):
                round_inputs_of(linear_of(layer, path), scheme)
            quantized |= self._writers(layer, writers, scheme)
        return quantized | self._reader(layer, reader, scheme)

    def _writers(self, layer: nn.Module, writers: Projections, scheme: Scheme) -> dict[str, Quantized]:
        linears = [linear_of(layer, path) for path in writers.paths]
        moments = Moments(writers.inputs, device=linears[0].weight.device)
        hook = linears[0].register_forward_pre_hook(lambda _, args: moments.add(args[0]))
        for _ in self.walker.run(layer, writers.block, self.stream):
            pass
        hook.remove()
        moments.add_up(self.walker.layers.processes)
        moments.require_finite(f"{writers.block.path}.{writers.paths[0]}")
        # Rows are rounded independently of each other, so all matrices share one factor of the Hessian.
        weight = torch.cat([linear.weight.double() for linear in linears])
        own = [linear.bias.double() for linear in linears if linear.bias is not None]
        matrix, bias = self._rounded(weight, torch.cat(own) if own else None, moments, scheme)
        sizes = [linear.out_features for linear in linears]
        split = zip(matrix.values.split(sizes), matrix.scales.split(sizes), strict=True)
        parts = [Quantized(scheme, *part) for part in split]
        biases = [None] * len(parts) if bias is None else bias.split(sizes)
        for linear, part, shift in zip(linears, parts, biases, strict=True):
            _overwrite(linear, part.dequantized(), shift)
        return dict(zip(writers.paths, parts, strict=True))

    def _reader(self, layer: nn.Module, reader: Projections, scheme: Scheme | None) -> dict[str, Quantized]:
        (path,) = reader.paths
        linear = linear_of(layer, path)
        weight = linear.weight.double()
        bias = None if linear.bias is None else linear.bias.double()
        moments, held_out = (Moments(reader.inputs, linear.out_features, weight.device) for _ in range(2))
        for batch, run in self.walker.run(layer, reader.block, self.stream):
            split_rows(batch, run.inputs, self.aims[batch].to(weight.device), moments, held_out, self.stream.first)
        for part in (moments, held_out):
            part.add_up(self.walker.layers.processes)
            if part.count:
                part.require_finite(f"{reader.block.path}.{path}")
        damping = PruneOptions.damping
        if held_out.count:
            damping = choose_damping(weight, bias, moments, held_out, damping)
            moments.absorb(held_out)
        every = torch.arange(reader.inputs, device=weight.device)
        fitted, shift = refit(weight, bias, every, moments, damping)
        if scheme is None:
            _overwrite(linear, fitted, shift)
            return {}
        matrix, shift = self._rounded(fitted, shift, moments, scheme)
        _overwrite(linear, matrix.dequantized(), shift)
        return {path: matrix}

    def _rounded(
        self, weight: Tensor, bias: Tensor | None, moments: Moments, scheme: Scheme
    ) -> tuple[Quantized, Tensor | None]:
        """Return the weight on the grid, and the bias, if any, which takes the mean of the error."""
        gram = moments.gram
        if bias is None:
            return gptq(weight, gram, scheme, self.dtype), None
        mean = moments.mean
        matrix = gptq(weight, gram - mean[:, None] * mean, scheme, self.dtype)
        return matrix, bias + (weight - matrix.dequantized().double()) @ mean


def _overwrite(linear: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    linear.weight.copy_(weight)
    if bias is not None:
        linear.bias.copy_(bias)
