"""Write checkpoints with random weights, without holding them in memory: for what depends on shapes alone."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from numprune.export import checkpoint, manifest
from numprune.export.shards import writing
from numprune.export.weights import SLAB_BYTES
from numprune.surgery import skeleton
from numprune.tensors import tensor_table

_DEVIATION = 0.02  # standard deviation of Llama's initial weights


def write_random(out: Path, config: PreTrainedConfig, source: Path, dtype: torch.dtype, seed: int = 0) -> None:
    """Write a checkpoint of `config` to the new folder `out`; matrices are normal, vectors are ones, biases zeros.

    Args:
        source: a checkpoint with the tokenizer and the other files.
        dtype: of all weights.
        seed: of the weights.

    Raises:
        InputError: `out` exists, or the tokenizer has tokens that the model lacks.
    """
    checkpoint.check_vocabulary(out, checkpoint.text_tokenizer(source), config)
    model, table = skeleton(config), tensor_table(config)
    shapes = {name: shape for name, shape in table.shapes.items() if name not in table.tied}
    generator = torch.Generator().manual_seed(seed)
    with manifest.creating(out, kind="checkpoint", facts={"random": seed}) as folder:
        with writing(folder, dict.fromkeys(shapes, dtype)) as writer:
            for name, shape in shapes.items():
                writer.add_slabs(name, shape, _slabs(name, shape, generator))
        checkpoint.save_around_weights(model, source, folder)


def _slabs(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Iterator[Tensor]:
    if len(shape) == 1:
        yield torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
        return
    row = torch.Size(shape[1:])
    step = max(1, SLAB_BYTES // (4 * row.numel()))
    for start in range(0, shape[0], step):
        yield torch.randn(min(step, shape[0] - start), *row, generator=generator) * _DEVIATION
