"""Refit the matrices that read the residual stream after the hidden size was cut.

A matrix W reads the stream through a norm. Let n (H,) be the norm's output in the dense model, and n' (K,) that in the
narrower one. The refitted matrix is W B, where B (H, K) is the ridge regression from n' to n, shrunk towards the plain
slice E_K, which uses n'_k for n_k and ignores the rest:

    B = E_K + (E[n n'^T] - E_K G) (G + gamma I)^-1,  G = E[n' n'^T].

This is compensation.py's refit of a slice of the identity matrix, with gamma chosen in the same way. One B serves all
matrices behind a norm, because every row of W B is the result of the same regression for that row of W. So the refit
never raises the error of any of them on the rows that it is fitted to. If all matrices of a block have biases, the fit
is centred and the biases take the mean.

The narrower norm divides by the root mean square of the kept coordinates only. B makes up for that, too.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from numprune.blocks import Block
from numprune.compensation import choose_damping, refit
from numprune.hidden import inputs_of
from numprune.moments import Moments


@dataclass(frozen=True)
class ReadMap:
    """n is fitted by `columns` n' + `shift`.

    Attributes:
        columns: B, (H, K) float64.
        shift: (H,) float64; None: not fitted.
    """

    columns: Tensor
    shift: Tensor | None = None


def fit_read_map(
    kept: Tensor, size: int, moments: Moments, held_out: Moments | None, damping: float, *, centred: bool = False
) -> ReadMap:
    """Return the map that fits what a norm gives in the dense model.

    Args:
        kept: (K,) kept coordinates.
        size: H.
        moments: of n' (K,) with targets n (H,).
        held_out: the part of them that chooses the damping; None: `damping` it is.
        damping: the smallest gamma tried, relative to the mean of diag(G).
        centred: also fit a shift.
    """
    device = moments.gram.device
    plain = torch.eye(size, dtype=torch.float64, device=device)[:, kept.to(device)]
    bias = plain.new_zeros(size) if centred else None
    if held_out is not None:
        damping = choose_damping(plain, bias, moments.without(held_out), held_out, damping)
    return ReadMap(*refit(plain, bias, torch.arange(len(kept), device=device), moments, damping))


def copy_readers(layer: nn.Module, block: Block) -> nn.Module:
    """Return a layer with copies of the parameters that `refit_readers` changes; it shares all others with `layer`."""
    changed = {id(layer.get_parameter(name)) for name in inputs_of(block)}
    changed |= {id(bias) for bias in _biases(layer, block)}
    return copy.deepcopy(layer, {id(one): one for one in layer.parameters() if id(one) not in changed})


def has_biases(layer: nn.Module, block: Block) -> bool:
    """Return whether every matrix with which the block reads the stream has a bias."""
    return None not in _biases(layer, block)


@torch.no_grad()
def refit_readers(layer: nn.Module, block: Block, kept: Tensor, found: ReadMap) -> None:
    """Apply the map in place. Columns of coordinates that are not `kept`, (K,), become zero."""
    for (name, dim), bias in zip(inputs_of(block).items(), _biases(layer, block), strict=True):
        last = layer.get_parameter(name).movedim(dim, -1)
        if found.shift is not None and bias is not None:
            bias += (last.double() @ found.shift).to(bias.dtype)
        fitted = (last.double() @ found.columns).to(last.dtype)
        last.zero_()
        last[..., kept] = fitted


def _biases(layer: nn.Module, block: Block) -> list[Tensor | None]:
    """Return the bias of each matrix of `inputs_of`."""
    parameters = dict(layer.named_parameters())
    return [
        parameters.get(f"{name.removesuffix('weight')}bias" if name.endswith(".weight") else f"{name}_bias")
        for name in inputs_of(block)
    ]
