"""What published methods rank the coordinates or directions of the residual stream by."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from numprune.anatomy import read_anatomy
from numprune.hidden import EPSILON, norm_of


@torch.inference_mode()
def embedding_importance(model: PreTrainedModel, rows: Tensor, batch_size: int) -> Tensor:
    """Return Minitron's score of each coordinate (Muralidharan et al. 2024, arXiv 2407.14679, 2.2), (H,) float64.

    It is the size of the norms' outputs: the L2 norm over a row's tokens, averaged over rows and summed over norms.
    """
    score = torch.zeros(model.config.hidden_size, dtype=torch.float64, device=model.device)

    def add(_norm: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> None:
        score.add_(output.double().square().sum(1).sqrt().sum(0))

    _over_norms(model, rows, batch_size, add)
    return score / len(rows)


@torch.inference_mode()
def signal_moment(model: PreTrainedModel, rows: Tensor, batch_size: int) -> Tensor:
    """Return the summed second moment of the norms' outputs without their gains, (H, H) float64.

    Its eigenvectors are the principal components of SliceGPT (arXiv 2401.15024), one basis for all blocks.
    """
    size, epsilon = model.config.hidden_size, getattr(model.config, EPSILON)
    moment = torch.zeros(size, size, dtype=torch.float64, device=model.device)

    def add(_norm: nn.Module, inputs: tuple[Any, ...], _output: Tensor) -> None:
        x = nn.functional.rms_norm(inputs[0], (size,), eps=epsilon).flatten(0, -2).double()
        moment.addmm_(x.T, x)

    _over_norms(model, rows, batch_size, add)
    return moment


def _over_norms(model: PreTrainedModel, rows: Tensor, batch_size: int, hook: Callable[..., None]) -> None:
    """Run the model with a forward hook on every norm that reads the residual stream."""
    anatomy = read_anatomy(model.config)
    paths = {anatomy.final_gain.removesuffix(".weight"): None}
    for index in range(anatomy.layers):
        blocks = [block for block in anatomy.of_layer(index) if block.units]
        paths |= {f"{block.path}.{norm_of(blocks, block)}": None for block in blocks}
    handles = [model.get_submodule(path).register_forward_hook(hook) for path in paths]
    try:
        for batch in rows.split(batch_size):
            model.base_model(input_ids=batch.to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
