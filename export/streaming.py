"""A checkpoint as its layers, read from its shards one at a time: for models larger than the memory.

In memory are at any time: the layer that is asked for, in the data type that is computed in; the rows of the embedding
that a batch of tokens needs; and what the kernel likes to keep of the mapped hidden states.
"""

import copy
import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from numprune.anatomy import read_anatomy
from numprune.errors import InputError
from numprune.export import checkpoint
from numprune.export.shards import ShardWriter
from numprune.export.weights import read_rows, slabs
from numprune.layers import Head, rotary_of
from numprune.surgery import skeleton

_EMBEDDING = "model.embed_tokens.weight"
_LAYERS = "model.layers."


class CheckpointLayers:
    """The layers of a checkpoint folder (numprune.layers.Layers).

    Args:
        folder: a local checkpoint. All of it is read and checked here, as `checkpoint.load` does, and then again layer
            by layer, whenever one is asked for.
        scratch: a folder on a disk with room for hidden states. The files there have no names: nothing is left of them
            when the process ends, however it ends.
        device: where the modules are, one layer at a time.
        dtype: that is computed in, whatever is stored.

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
    ) -> None:
        self._stored = checkpoint.audit(folder)
        checkpoint.check_finite(self._stored)
        self._skeleton = skeleton(checkpoint.read_config(folder))
        self._scratch = scratch
        self.config: PreTrainedConfig = self._skeleton.config
        self.anatomy = read_anatomy(self.config)
        self.device = torch.device(device)
        self.dtype = dtype

    @property
    def names(self) -> list[str]:
        """Of all tensors, tied ones once."""
        tied = self._skeleton.all_tied_weights_keys
        return [name for name in self._skeleton.state_dict() if name not in tied]

    def embed(self, rows: Tensor) -> Tensor:
        tokens, places = rows.unique(return_inverse=True)
        header = self._stored[_EMBEDDING]
        table = torch.cat([read_rows(header, token, token + 1) for token in tokens.tolist()])
        return table.to(self.device, self.dtype)[places.to(self.device)]

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        with self._filled(self._skeleton.model.layers[index], f"{_LAYERS}{index}.") as layer:
            yield layer

    @contextmanager
    def head(self) -> Iterator[Head]:
        with (
            self._filled(self._skeleton.model.norm, "model.norm.") as norm,
            self._filled(self._skeleton.lm_head, "lm_head.") as output,
        ):
            yield Head(norm, output)

    def rotary(self, length: int) -> tuple[Tensor, Tensor]:
        module = type(self._skeleton.model.rotary_emb)(config=self.config).to(self.device)
        return rotary_of(module, length, self.dtype)

    def allocate(self, *shape: int) -> Tensor:
        return _mapped(self._scratch, torch.Size(shape), self.dtype)

    def copy_around(self, writer: ShardWriter) -> None:
        """Write the tensors that stand around the layers as they are: embedding, last norm, output matrix."""
        for name in self.names:
            if not name.startswith(_LAYERS):
                writer.add_slabs(name, self._stored[name].shape, slabs(self._stored[name]))

    @contextmanager
    def _filled(self, empty: nn.Module, prefix: str) -> Iterator[nn.Module]:
        module = copy.deepcopy(empty)
        state = {name: self._read(prefix + name) for name in module.state_dict()}
        module.load_state_dict(state, assign=True)
        del state
        try:
            yield module
        finally:
            module.to("meta")  # whoever still holds it keeps no weights in memory

    def _read(self, name: str) -> Tensor:
        source = name if name in self._stored else self._skeleton.all_tied_weights_keys[name]
        return read_rows(self._stored[source]).to(self.device, self.dtype)


def _mapped(folder: Path, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Room for a tensor in a file without a name: the kernel writes it out when it needs the memory for something else.

    Raises InputError when the disk is full.
    """
    size = shape.numel() * dtype.itemsize
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            raise InputError(f"{folder}: no room for {size:,} bytes of hidden states: {error.strerror}") from None
        content = mmap.mmap(file.fileno(), size)
    return torch.frombuffer(content, dtype=dtype).view(shape)
