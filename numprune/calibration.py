"""Run a model block by block over calibration rows, and return each block's consumer inputs and outputs.

All rows pass through one layer before the next: the hidden states of all rows are kept, and the weights of one layer
are used at a time. The dense and the pruned model can thus advance side by side.

A layer is run by its own forward pass, with the arguments that the model calls it with. To run one block alone, the
output of the layer's other block is set to zero, and a norm after the sum of that block, if any, is bypassed.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from numprune.blocks import Anatomy, Block
from numprune.errors import InputError
from numprune.experts.inputs import Routed
from numprune.layers import Arguments, Layers, device_of, replaced
from numprune.stand_ins import playing, stand_ins
from numprune.windows import windows_of


def check_rows(anatomy: Anatomy, rows: Tensor) -> None:
    """Refuse rows that do not fit the model.

    Raises:
        InputError: a token outside the vocabulary, rows longer than the context, or images of another shape.
    """
    if anatomy.image is not None:
        if tuple(rows.shape[1:]) != anatomy.image:
            raise InputError(
                f"rows have shape {list(rows.shape)}, but the model reads images of shape {list(anatomy.image)}"
            )
        return
    length, limit = rows.shape[1], anatomy.context
    if length > limit:
        raise InputError(f"sequence length {length} exceeds the model's {limit}; use rows of at most {limit} tokens")
    if int(rows.max()) >= anatomy.vocabulary:
        raise InputError(
            f"token {int(rows.max())} is outside the model's vocabulary of {anatomy.vocabulary}: "
            "the tokenizer is not this model's"
        )


def consumer_of(layer: nn.Module, block: Block) -> nn.Linear:
    """Return the projection of the block in its decoder layer that reads the prunable channels."""
    return cast(nn.Linear, layer.get_submodule(block.consumer))


def consumer_weight(layer: nn.Module, block: Block) -> Tensor:
    """Return the consumer's weight (out, D), a view if it is stored transposed."""
    weight = consumer_of(layer, block).weight
    return weight if block.reader.dim == 1 else weight.T


@dataclass(frozen=True)
class BlockRun:
    """One block over a batch.

    Attributes:
        inputs: (n, S, D), of the consumer.
        output: (n, S, out), of the consumer, bias included.
        after: (n, S, H), the layer's output when its other blocks output zeros.
        routed: for experts, the n * S routed tokens.
    """

    inputs: Tensor
    output: Tensor
    after: Tensor
    routed: Routed | None = None


def run_block(layer: nn.Module, anatomy: Anatomy, block: Block, arguments: Arguments, hidden: Tensor) -> BlockRun:
    """Run one block of its decoder layer on `hidden` (n, S, H)."""
    seen: list[tuple[tuple[Tensor, ...], Tensor]] = []
    with _alone(layer, anatomy, block):
        hook = consumer_of(layer, block).register_forward_hook(lambda _, args, output: seen.append((args, output)))
        try:
            after = arguments.call(layer, hidden)
        finally:
            hook.remove()
    args, output = seen.pop()
    inputs, output = (by_token(layer, block, value, len(hidden)) for value in (args[0], output))
    return BlockRun(inputs, output, after, Routed(*args) if block.routing else None)


def consumer_inputs(layer: nn.Module, anatomy: Anatomy, block: Block, arguments: Arguments, hidden: Tensor) -> Tensor:
    """Return the inputs (n, S, D) of the block's consumer on `hidden` (n, S, H); the consumer itself is not run."""
    seen: list[Tensor] = []
    consumer = consumer_of(layer, block)
    outputs = consumer_weight(layer, block).shape[0]

    def watch(inputs: Tensor) -> Tensor:
        seen.append(inputs)
        return inputs.new_zeros(*inputs.shape[:-1], outputs)

    with _alone(layer, anatomy, block), replaced([consumer], watch):
        arguments.call(layer, hidden)
    return by_token(layer, block, seen.pop(), len(hidden))


def by_token(layer: nn.Module, block: Block, values: Tensor, rows: int) -> Tensor:
    """Return values (…, D) that a module of the block reads or writes by row and token: (n, S, D), n = `rows`."""
    if block.in_windows:
        return windows_of(layer, block).by_token(values)
    return values.reshape(rows, -1, values.shape[-1])  # some models flatten rows


def after_block(
    layer: nn.Module, anatomy: Anatomy, block: Block, arguments: Arguments, hidden: Tensor, output: Tensor
) -> Tensor:
    """Return the layer's output if the block's consumer outputs `output` (n, S, out), and its other blocks zeros."""
    if block.in_windows:
        output = windows_of(layer, block).by_position(output)
    with _alone(layer, anatomy, block), _standing(layer, playing(block, output)):
        return arguments.call(layer, hidden)


def _alone(layer: nn.Module, anatomy: Anatomy, block: Block) -> AbstractContextManager[None]:
    """Silence the layer's other blocks."""
    return silenced(layer, [other for other in anatomy.of_layer(block.layer) if other.name != block.name])


@contextmanager
def silenced(layer: nn.Module, blocks: Iterable[Block]) -> Iterator[None]:
    """Run the layer without these of its blocks."""
    with ExitStack() as stack:
        for block in blocks:
            if block.units:
                stack.enter_context(_standing(layer, stand_ins(block)))
        yield


@contextmanager
def _standing(layer: nn.Module, forwards: dict[str, Callable[..., Any]]) -> Iterator[None]:
    """Replace the forward passes of the layer's modules by these, by path."""
    with ExitStack() as stack:
        for path, forward in forwards.items():
            stack.enter_context(replaced([layer.get_submodule(path)], forward))
        yield


class Stream:
    """The residual stream of all rows as it passes through the blocks.

    Attributes:
        hidden: (N, S, H), including the outputs of the blocks so far.
        layer: in front of which, or in which, the stream is.
        first: number of rows before these that other processes have.
    """

    def __init__(self, hidden: Tensor, entry: Tensor | None, first: int = 0) -> None:
        self.hidden = hidden
        self.layer = 0
        self.first = first
        self._entry = entry  # input shared by parallel blocks; None: all blocks read `hidden`

    def enter(self, block: Block) -> None:
        """Say which block comes next."""
        if self._entry is not None and not block.beside:
            self._entry.copy_(self.hidden)

    def read(self, batch: slice) -> Tensor:
        """Return a block's input, (n, S, H)."""
        return (self.hidden if self._entry is None else self._entry)[batch]

    def write(self, batch: slice, after: Tensor) -> None:
        """Update the stream with `after`, the layer's output with a single block in it."""
        after = after.to(self.hidden.device)
        if self._entry is None:
            self.hidden[batch] = after
        else:
            self.hidden[batch] += after - self._entry[batch]

    def __len__(self) -> int:
        return len(self.hidden)


class Walker:
    """Runs the blocks of one model over rows of one shape, without padding, in batches.

    Args:
        layers: of the model.
        row: shape of a row: (S,) tokens, or (C, height, width) pixels, of which S tokens are made.
        batch_size: rows at a time.

    Attributes:
        row: that shape.
    """

    def __init__(self, layers: Layers, row: Sequence[int], batch_size: int = 8) -> None:
        self.layers = layers
        self.row = tuple(row)
        self._batch_size = batch_size
        self._arguments: dict[int, tuple[Arguments, ...]] = {}  # by rows in a batch

    @torch.no_grad()
    def embed(self, rows: Tensor, first: int = 0) -> Stream:
        """Return the stream in front of the first layer; `first`: rows before these that other processes have."""
        anatomy = self.layers.anatomy
        hidden = self.layers.allocate(len(rows), *anatomy.stream_of(self.row, 0))
        for batch in self.batches(len(rows)):
            hidden[batch] = self.layers.enter(rows[batch]).hidden.to(hidden.device)
        return self.stream(hidden, first)

    def share(self, rows: int) -> slice:
        """Return which of `rows` rows this process measures."""
        return self.layers.processes.share(rows, self._batch_size)

    def stream(self, hidden: Tensor, first: int = 0) -> Stream:
        """Return a stream that takes over `hidden` (N, S, H); `first` as for `embed`."""
        apart = self.layers.anatomy.has_parallel_blocks
        return Stream(hidden, self.layers.allocate(*hidden.shape).copy_(hidden) if apart else None, first)

    def copy(self, stream: Stream, gone: Tensor | None = None) -> Stream:
        """Return a copy of a stream on which no block has been run yet, stored in the same place.

        `gone`: coordinates that are zero in the copy.
        """
        hidden = self.layers.allocate(*stream.hidden.shape).copy_(stream.hidden)
        if gone is not None:
            hidden.index_fill_(-1, gone.to(hidden.device), 0)
        return self.stream(hidden, stream.first)

    def enter(self, stream: Stream, block: Block) -> None:
        """Say which block comes next. If its layer begins a stage, or one before it did, tokens are merged first."""
        stream.enter(block)
        for layer in range(stream.layer + 1, block.layer + 1):
            stream.hidden = self.merged(layer, stream.hidden)
        stream.layer = block.layer

    @torch.no_grad()
    def merged(self, layer: int, hidden: Tensor) -> Tensor:
        """Return what a layer reads, (N, S, H), of what leaves the one before: the same, unless it begins a stage."""
        if layer not in self.layers.anatomy.mergings:
            return hidden
        after = self.layers.allocate(len(hidden), *self.layers.anatomy.stream_of(self.row, layer))
        for batch in self.batches(len(hidden)):
            arguments = self.arguments(batch.stop - batch.start)[layer]
            after[batch] = arguments.merged(hidden[batch].to(self.layers.device)).to(after.device)
        return after

    @torch.no_grad()
    def run(self, layer: nn.Module, block: Block, stream: Stream) -> Iterator[tuple[slice, BlockRun]]:
        """Run the block batch by batch; yield the rows and the result of each, on the layer's device."""
        self.enter(stream, block)
        for batch in self.batches(len(stream)):
            yield batch, self.run_batch(layer, block, stream.read(batch))

    def run_batch(self, layer: nn.Module, block: Block, hidden: Tensor) -> BlockRun:
        """Run the block on `hidden` (n, S, H), with gradients if they are enabled."""
        arguments = self.arguments(len(hidden))[block.layer]
        return run_block(layer, self.layers.anatomy, block, arguments, self._moved(layer, hidden))

    @torch.no_grad()
    def inputs(self, layer: nn.Module, block: Block, stream: Stream) -> Iterator[tuple[slice, Tensor]]:
        """Run the block up to its consumer, batch by batch; yield the rows of each and the consumer's inputs."""
        self.enter(stream, block)
        for batch in self.batches(len(stream)):
            yield batch, self.inputs_batch(layer, block, stream.read(batch))

    def inputs_batch(self, layer: nn.Module, block: Block, hidden: Tensor) -> Tensor:
        """Return the consumer's inputs (n, S, D) on `hidden` (n, S, H), with gradients if they are enabled."""
        arguments = self.arguments(len(hidden))[block.layer]
        return consumer_inputs(layer, self.layers.anatomy, block, arguments, self._moved(layer, hidden))

    @torch.no_grad()
    def give(self, layer: nn.Module, block: Block, stream: Stream, batch: slice, output: Tensor) -> None:
        """Add the consumer's `output` (n, S, out) to the stream without running the block."""
        arguments = self.arguments(batch.stop - batch.start)[block.layer]
        hidden = self._moved(layer, stream.read(batch))
        stream.write(batch, after_block(layer, self.layers.anatomy, block, arguments, hidden, output))

    def arguments(self, rows: int) -> tuple[Arguments, ...]:
        """Return each layer's arguments for a batch of `rows` rows: without padding they depend on nothing else."""
        if rows not in self._arguments:
            dtype = torch.long if self.layers.anatomy.image is None else self.layers.dtype
            with torch.no_grad():
                entered = self.layers.enter(torch.zeros(rows, *self.row, dtype=dtype))
            self._arguments[rows] = entered.arguments
        return self._arguments[rows]

    @torch.no_grad()
    def advance(self, layer: nn.Module, block: Block, stream: Stream) -> None:
        """Run the block and add its output to the stream."""
        for batch, run in self.run(layer, block, stream):
            stream.write(batch, run.after)

    @torch.no_grad()
    def through(self, layer: nn.Module, index: int, hidden: Tensor, leaving: Tensor) -> None:
        """Run a whole layer on `hidden` (N, S, H); write its output into `leaving`, which may be `hidden`."""
        for batch in self.batches(len(hidden)):
            arguments = self.arguments(batch.stop - batch.start)[index]
            leaving[batch] = arguments.call(layer, self._moved(layer, hidden[batch])).to(leaving.device)

    def _moved(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        return hidden.to(device_of(layer, self.layers.device))

    def batches(self, rows: int) -> Iterator[slice]:
        """Yield the batches of `rows` rows as slices."""
        for start in range(0, rows, self._batch_size):
            yield slice(start, min(start + self._batch_size, rows))
