"""Depth pruning by block influence (ShortGPT; Men et al. 2024, arXiv 2403.03853)."""

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from numprune.anatomy import family_of, read_anatomy
from numprune.blocks import Anatomy
from numprune.budget import budget_of
from numprune.configs import pruned_config
from numprune.errors import InputError
from numprune.flows.studies.rivals.result import Result
from numprune.slices import GONE
from numprune.surgery import assemble


def shortgpt(model: PreTrainedModel, rows: Tensor, ratio: float, batch_size: int) -> Result:
    """Remove the decoder layers of least influence until the ratio is closest; nothing is refitted.

    Args:
        model: used up.
        rows: (N, S) int64 calibration tokens.
        ratio: of the prunable parameters, reached to within half a layer. At least one layer stays.
        batch_size: rows at a time.

    Raises:
        InputError: only some layers have a sliding window; the cache of such a model needs all layers.
    """
    anatomy = read_anatomy(model.config)
    check_layers(anatomy)
    gone = layers_to_drop(anatomy, block_influence(model, rows, batch_size), ratio)
    left = anatomy.keeping({block.name: GONE if block.layer in gone else block.size for block in anatomy.blocks})
    inside = tuple(f"{block.path}." for block in anatomy.blocks if block.layer not in gone)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(inside)}
    pruned = assemble(model, pruned_config(model.config, left), tensors)
    after = budget_of(left)
    removed = 1 - after.prunable_parameters / budget_of(anatomy).prunable_parameters
    return Result(pruned, after.parameters, removed)


def check_layers(anatomy: Anatomy) -> None:
    """Refuse a model whose layers cannot be removed. Raises InputError."""
    if anatomy.attention_differs:
        raise InputError("shortgpt: a model with sliding windows in some layers only must keep every layer")
    if "experts" in anatomy.kinds:
        raise InputError("shortgpt: models with experts are not supported")


def layers_to_drop(anatomy: Anatomy, influence: Tensor, ratio: float) -> set[int]:
    """Return the layers of least `influence` (layers,) whose removed share is closest to `ratio`."""
    sizes = [0] * anatomy.layers
    for block in anatomy.blocks:
        sizes[block.layer] += block.parameters(block.size)
    order = influence.argsort(stable=True).tolist()[:-1]
    removed = list(accumulate((sizes[layer] for layer in order), initial=0))
    count = min(range(len(removed)), key=lambda n: abs(removed[n] - ratio * sum(sizes)))
    return set(order[:count])


@torch.inference_mode()
def block_influence(model: PreTrainedModel, rows: Tensor, batch_size: int) -> Tensor:
    """Return BI_i = 1 - E[cos(x_i, x_{i+1})] over all tokens, (layers,) float64; x_i enters layer i (eq. 1)."""
    layers: Any = model.get_submodule(family_of(model.config).layers)
    similarity = torch.zeros(len(layers), dtype=torch.float64)

    def add(index: int) -> Callable[..., None]:
        def hook(_layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            similarity[index] += torch.cosine_similarity(inputs[0].double(), output.double(), dim=-1).sum().cpu()

        return hook

    handles = [layer.register_forward_hook(add(index)) for index, layer in enumerate(layers)]
    try:
        for batch in rows.split(batch_size):
            model.base_model(input_ids=batch.to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return 1 - similarity / rows.numel()
