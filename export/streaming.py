"""The layers of a checkpoint, read from its shards one at a time: for models larger than memory.

At any time, memory holds the requested layer and the one that is read ahead, both in the compute data type, the
embedding rows that a batch of tokens needs, and the pages of the mapped hidden states that the kernel caches.
"""

import mmap
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from numprune.anatomy import family_of, read_anatomy
from numprune.errors import DiskError
from numprune.export import checkpoint, disk
from numprune.export.headers import TensorHeader
from numprune.export.read_ahead import ReadAhead
from numprune.export.shards import ShardWriter
from numprune.export.tasks import load_task
from numprune.export.weights import read_rows, slabs
from numprune.hidden import Narrowing
from numprune.layers import Entered, Head, enter, leave, unscale
from numprune.processes import ALONE, Processes
from numprune.quantization.lm_head import last_norm
from numprune.surgery import skeleton
from numprune.tasks import Task
from numprune.tensors import tensor_table


class CheckpointLayers:
    """The layers of a checkpoint folder (numprune.layers.Layers).

    Args:
        folder: a local checkpoint. It is read and checked as a whole first, as by `checkpoint.load`, and then read
            again layer by layer.
        scratch: a folder on a disk with room for hidden states, which need not exist yet. The files have no names, so
            nothing remains when the process ends, however it ends.
        device: of the modules, a layer and the next one at a time.
        dtype: to compute in, whatever is stored.
        processes: that share the rows.

    Raises:
        InputError: a file is missing or malformed, or the architecture is not supported.
        IntegrityError: what is stored is not what the configuration says, or is not finite.
    """

    resident = False

    def __init__(
        self,
        folder: Path,
        *,
        scratch: Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        processes: Processes = ALONE,
    ) -> None:
        self.stored = checkpoint.audit(folder)
        checkpoint.check_finite(self.stored)
        self._skeleton = skeleton(checkpoint.read_config(folder))
        self._names = tensor_table(self._skeleton.config).parts
        counts = Counter(self._names.values())
        self._own = {names for names, count in counts.items() if len(names) == count == 1}  # of one tensor as it is
        checkpoint.round_inputs(self._skeleton, checkpoint.quantized(self.stored))
        self._family = family_of(self._skeleton.config)
        self.task: Task = load_task(folder)
        self.processes = processes
        self._scratch = disk.existing(scratch)
        self.config: PreTrainedConfig = self._skeleton.config
        self.anatomy = read_anatomy(self.config)
        # Only some rows of an embedding are filled, and the padding row matters for training only.
        self._embedding: Any = self._skeleton.get_input_embeddings() if self.anatomy.image is None else None
        if self._embedding is not None:
            self._embedding.padding_idx = None
        self._ahead = ReadAhead(self.anatomy.layers, self._layer_names, self._parameter)
        self.device = torch.device(device)
        self.dtype = dtype
        for module in self._skeleton.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self.device))
        for path in self.anatomy.mergings.values():  # small, and needed between layers
            merging = self._skeleton.get_submodule(path)
            self._fill(self._parameters(f"{path}.{name}" for name, _ in merging.named_parameters()))

    def enter(self, tokens: Tensor, mask: Tensor | None = None) -> Entered:
        with self._around(tokens, head=False):
            return enter(self._skeleton, self.anatomy, tokens.to(self.device), mask)

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        try:
            with self._filled(self._ahead.take(index)):
                yield unscale(self._layer(index), self.anatomy.of_layer(index))
        except BaseException:
            self._ahead.stop()
            raise

    @contextmanager
    def head(self) -> Iterator[Head]:
        def run(tokens: Tensor, hidden: Tensor) -> Tensor:
            return leave(self.task, self._skeleton, self.anatomy, torch.zeros_like(tokens, device=self.device), hidden)

        # Only the shape of the tokens is used.
        with self._around(torch.zeros(1, 1, dtype=torch.long), head=True):
            yield run

    def _layer_names(self, index: int) -> list[str]:
        path = self.anatomy.layer_paths[index]
        return [f"{path}.{name}" for name, _ in self._layer(index).named_parameters()]

    def _layer(self, index: int) -> nn.Module:
        return self._skeleton.get_submodule(self.anatomy.layer_paths[index])

    def allocate(self, *shape: int, near: int | None = None) -> Tensor:
        return _mapped(self._scratch, torch.Size(shape), self.dtype)

    def write(self, tensors: Mapping[str, Tensor], writer: ShardWriter) -> None:
        """Write tensors of a model of the same class, by their names in it."""
        writer.add(checkpoint.stored_tensors(self._skeleton, tensors))

    @contextmanager
    def last_norm(self) -> Iterator[nn.Module]:
        """Yield the norm after the last layer of a decoder."""
        with self._filled(self._parameters([self.anatomy.final_gain])):
            yield last_norm(self._skeleton)

    def copy_around(
        self,
        writer: ShardWriter,
        narrowing: Narrowing | None = None,
        rounded: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Write the tensors outside the layers: embedding, last norm, output matrix.

        Args:
            narrowing: of the residual stream; None: the tensors are unchanged.
            rounded: maps rows of the output matrix, (n, H), to those written; None: they are unchanged.
        """
        left = set() if narrowing and narrowing.rotation is not None else set(self._skeleton.all_tied_weights_keys)
        gain = self._read(self.anatomy.final_gain).float() if narrowing else None
        output = self._output_matrix() if rounded else None
        for name, names in self._names.items():
            if name in left or self.anatomy.is_in_layers(name):
                continue
            for stored in names:
                header = self.stored[stored] if stored in self.stored else self._header(name)
                shape, parts = header.shape, slabs(header)
                if narrowing is not None and gain is not None:
                    shape = (*shape[:-1], len(narrowing.kept))
                    parts = (narrowing.around(name, part.float(), gain, self.anatomy) for part in parts)
                if rounded is not None and name == output:
                    parts = map(rounded, parts)
                writer.add_slabs(stored, shape, parts)

    def _output_matrix(self) -> str:
        """Return the name in the model of what is stored as the output matrix: the embedding, if tied to it."""
        found = self._skeleton.get_output_embeddings().weight
        name = next(name for name, value in self._skeleton.named_parameters(remove_duplicate=False) if value is found)
        return self._skeleton.all_tied_weights_keys.get(name, name)

    @contextmanager
    def _around(self, tokens: Tensor, *, head: bool) -> Iterator[None]:
        """Fill the modules outside the layers; of an embedding of tokens, only the rows of `tokens`."""
        if self._embedding is None:
            names = [name for name, _ in self._skeleton.named_parameters() if not self.anatomy.is_in_layers(name)]
            with self._filled(self._parameters(names)):
                yield
            return
        modules = {module: name for name, module in self._skeleton.named_modules()}
        embedding, output = f"{modules[self._embedding]}.weight", self._skeleton.get_output_embeddings()
        outputs = [f"{modules[output]}.{name}" for name, _ in output.named_parameters()] if output is not None else []
        own = (embedding, *outputs)
        every = [name for name, _ in self._skeleton.named_parameters() if name not in own]
        names = [name for name in every if not self.anatomy.is_in_layers(name)]
        used = tokens.unique().to(self.device)
        stored = self._header(embedding)
        rows = torch.cat([read_rows(stored, token, token + 1) for token in used.tolist()])
        values = {embedding: self._computing(rows), **self._parameters([*names, *(outputs if head else [])])}

        def places(_module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            return (torch.searchsorted(used, args[0].contiguous()),)

        looking_up = self._embedding.register_forward_pre_hook(places)
        try:
            with self._filled(values):
                yield
        finally:
            looking_up.remove()

    @contextmanager
    def _filled(self, values: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """Set the skeleton's parameters by name."""
        empty = self._fill(values)
        try:
            yield
        finally:
            for module, parameter, without_values in empty:  # a module that is still held keeps no weights
                setattr(module, parameter, without_values)

    def _fill(self, values: Mapping[str, nn.Parameter]) -> list[tuple[nn.Module, str, nn.Parameter]]:
        """Set parameters like `_filled`; return modules, names in them, and the parameters that were there."""
        before = []
        for name, value in values.items():
            path, _, parameter = name.rpartition(".")
            module = self._skeleton.get_submodule(path)
            before.append((module, parameter, module.get_parameter(parameter)))
            setattr(module, parameter, value)
        return before

    def _parameters(self, names: Iterable[str]) -> dict[str, nn.Parameter]:
        return {name: self._parameter(name) for name in names}

    def _parameter(self, name: str) -> nn.Parameter:
        return self._computing(self._read(name))

    def _computing(self, values: Tensor) -> nn.Parameter:
        return nn.Parameter(values.to(self.device, self.dtype))

    def _read(self, name: str) -> Tensor:
        """Return the model's tensor of this name in its stored data type."""
        if self._names[name] in self._own:
            return read_rows(self._header(name))
        parts = {stored: read_rows(self.stored[stored]) for stored in self._names[name]}
        return checkpoint.put_together(self._skeleton, parts)[name]

    def _header(self, name: str) -> TensorHeader:
        """Return the header of a tensor that is stored as one."""
        (stored,) = self._names[name]
        if stored not in self.stored:
            (stored,) = self._names[self._skeleton.all_tied_weights_keys[name]]
        return self.stored[stored]


def _mapped(folder: Path, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return a tensor mapped from a nameless file, which the kernel can write out when memory is short.

    Raises DiskError if the disk is full.
    """
    size = shape.numel() * dtype.itemsize
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, size)
            content = mmap.mmap(file.fileno(), size)
    except OSError as error:
        free, reason = disk.free_bytes(folder), disk.refusal(error) or error
        raise DiskError(
            f"{folder}: no space for {size:,} bytes of hidden states, {free:,} are free: {reason}"
        ) from None
    return torch.frombuffer(content, dtype=dtype).view(shape)
