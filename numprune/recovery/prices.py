"""The price of each block's pruning: the change of the dense model's predictions if only this block is pruned."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from numprune.anatomy import read_anatomy
from numprune.blocks import Block
from numprune.errors import InputError
from numprune.progress import progress
from numprune.recovery.loss import divergence, outputs
from numprune.tasks import CAUSAL, Task


@torch.no_grad()
def block_prices(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    rows: Tensor,
    dropped: Sequence[int] = (),
    micro_batch_size: int | None = None,
    task: Task = CAUSAL,
) -> dict[str, float]:
    """Return the price of each block of `model` by name, highest first: the divergence per prediction.

    Args:
        model: pruned from `dense`.
        rows: (n, S) int64.
        dropped: layers of `dense` that `model` does not have.
        micro_batch_size: rows at a time; None: all. It changes memory, not the result beyond rounding.
        task: of the models.

    Raises InputError if the models' layers do not correspond, or their hidden sizes differ.
    """
    sizes = [one.config.hidden_size for one in (model, dense)]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"train blocks: the hidden size is {sizes[0]}, and {sizes[1]} in the dense model, so its blocks cannot be "
            "replaced to price them; train all weights, or use lora"
        )
    blocks = [block for block in read_anatomy(model.config).blocks if block.units]
    whole = read_anatomy(dense.config)
    by_place = {(block.layer, block.kind): block for block in whole.blocks}
    left = [layer for layer in range(whole.layers) if layer not in dropped]
    parts = [part.to(model.device) for part in rows.split(micro_batch_size or len(rows))]
    unchanged = [outputs(task, dense, part) for part in parts]
    prices = {}
    for block in progress(blocks, "price", "block"):
        counterpart = by_place.get((left[block.layer], block.kind)) if block.layer < len(left) else None
        if counterpart is None:
            raise InputError(f"{block.name}: the dense model has no such block; it is not the one that was pruned")
        loss = 0.0
        for part, before in zip(parts, unchanged, strict=True):
            with _swapped(dense, counterpart, model, block):
                after = outputs(task, dense, part)
            loss += float(divergence(task, (dense, after), (dense, before), part))
        prices[block.name] = loss / (len(rows) * task.predictions_in(rows.shape[1]))
    return dict(sorted(prices.items(), key=lambda item: -item[1]))


@contextmanager
def _swapped(dense: PreTrainedModel, counterpart: Block, model: PreTrainedModel, block: Block) -> Iterator[None]:
    """Give the dense model's layer the modules of the pruned block."""
    layer, source = dense.get_submodule(counterpart.path), model.get_submodule(block.path)
    names = {tensor.partition(".")[0] for tensor in block.tensors()}
    own = {name: layer.get_submodule(name) for name in names}
    for name in names:
        setattr(layer, name, source.get_submodule(name))
    try:
        yield
    finally:
        for name, module in own.items():
            setattr(layer, name, module)
