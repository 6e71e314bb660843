"""Choose the experts of a layer to keep and their channels, and price every size."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from numprune.allocation import keep_highest
from numprune.blocks import Block
from numprune.criteria import CRITERIA, BlockView
from numprune.criteria.obs import greedy_removal
from numprune.experts.inputs import Experts, Seen
from numprune.experts.removal import greedy_experts, overlaps
from numprune.linalg import cholesky
from numprune.moments import Moments
from numprune.slices import Kept, Size

_TOKENS = 64  # tokens on which all experts are run at once


@dataclass(frozen=True)
class Scoring:
    """How a block's experts and channels are scored.

    Attributes:
        criterion: a name of `criteria.CRITERIA`.
        ratio, seed: as in `criteria.BlockView`.
        taylor: (E, I) float64, as there, or None.
        sensitivity: (H, H), S, by which `obs` ranks experts.
    """

    criterion: str
    ratio: float
    seed: int
    taylor: Tensor | None = None
    sensitivity: Tensor | None = None


def error_table(layer: nn.Module, block: Block, seen: Seen, sensitivity: Tensor) -> Tensor:
    """Return the loss in nats per token without n experts and m channels of every other, (E + 1, I).

    The experts' part comes from `greedy_experts`. The channels' part sums, over the remaining experts, greedy OBS
    curves of their weighted inputs, priced as in curves.py; errors of different experts are assumed to be independent.
    Tokens of removed experts are routed to the remaining ones, whose cost rises by the share of routing weights they
    gain. Sizes with fewer experts than a token is routed to have infinite cost.

    Args:
        sensitivity: (H, H), S.
    """
    experts = Experts(layer, block)
    order, losses = _removal(layer, block, seen, experts, sensitivity)
    priced = cholesky(sensitivity.to(experts.down.device, torch.float64)).T
    each = _each(experts, seen)
    curves = torch.stack([_channel_curve(priced @ down.double(), moments.gram) for down, moments in each])
    weight = seen.weight.cpu()
    table = torch.full((block.units + 1, block.members), torch.inf, dtype=torch.float64)
    stay = torch.ones(block.units, dtype=torch.bool)
    for gone in range(len(order) + 1):
        if gone:
            stay[order[gone - 1]] = False
        gained = float(weight.sum() / weight[stay].sum().clamp_min(torch.finfo(torch.float64).tiny))
        table[gone] = gained * curves[stay].sum(0) + (losses[gone - 1] if gone else 0.0)
    return table


def expert_scores(layer: nn.Module, block: Block, seen: Seen, scoring: Scoring) -> Tensor:
    """Return the scores of experts, (E,) float64; the highest are kept.

    `obs`: the share of the layer's value to the loss that is lost after removing an expert, in greedy order; a refit
    cannot recover all of it, so it matters which directions of the output suffer. `random`: noise. `frequency`: the
    mean routing weight. All others: the mean of the channels' scores.
    """
    if scoring.criterion == "frequency":
        return seen.weight / seen.weight.sum()
    if scoring.criterion == "random":
        return torch.rand(block.units, generator=torch.Generator().manual_seed(scoring.seed), dtype=torch.float64)
    experts = Experts(layer, block)
    if scoring.criterion != "obs":
        return torch.stack([scores.mean() for scores in _channel_scores(experts, seen, scoring)])
    assert scoring.sensitivity is not None
    priced = scoring.sensitivity.to(experts.down.device, torch.float64)
    order, losses = _removal(layer, block, seen, experts, priced)
    energy = sum(float((priced @ down.double() @ moments.gram * down).sum()) for down, moments in _each(experts, seen))
    scores = torch.full((block.units,), torch.inf, dtype=torch.float64)
    scores[order] = 2 * losses / max(energy, torch.finfo(torch.float64).tiny)
    return scores


def choose_experts(layer: nn.Module, block: Block, size: Size, seen: Seen, scoring: Scoring) -> Kept:
    """Return what to keep of the experts: the highest by `expert_scores`, and the highest channels of each."""
    if size.units == block.units:
        units = torch.arange(block.units)
    else:
        units = keep_highest(expert_scores(layer, block, seen, scoring), size.units).cpu()
    if size.members == block.members:
        return Kept.whole(units, block.members)
    scores = _channel_scores(Experts(layer, block), seen, scoring)
    members = [keep_highest(found, size.members).cpu() for found in scores]
    return Kept(units, torch.stack(members)[units])


def _removal(
    layer: nn.Module, block: Block, seen: Seen, experts: Experts, sensitivity: Tensor
) -> tuple[Tensor, Tensor]:
    """Return order and losses of `greedy_experts` on the sample."""
    assert block.routing is not None
    hidden = seen.sample
    priced = sensitivity.to(hidden)
    overlap = torch.cat([overlaps(experts.outputs(some), priced) for some in hidden.split(_TOKENS)])
    logits = layer.get_submodule(block.routing.router)(hidden)[0]
    return greedy_experts(logits, overlap, block.routing, block.routing.top_k)


def _channel_curve(priced: Tensor, gram: Tensor) -> Tensor:
    """Return the loss without the m cheapest channels, (I,), m = 0 … I - 1."""
    _, costs = greedy_removal(priced, gram, 1)
    return torch.cat([costs.new_zeros(1), costs.cumsum(0)[:-1] / 2]).cpu()


def _channel_scores(experts: Experts, seen: Seen, scoring: Scoring) -> list[Tensor]:
    """Return the scores of each expert's channels, (I,)."""
    score = CRITERIA[scoring.criterion]
    return [
        score(
            BlockView(
                down.double(),
                moments.gram,
                moments.mean,
                channels_per_unit=1,
                ratio=scoring.ratio,
                seed=(scoring.seed + expert) % (1 << 63),
                taylor=None if scoring.taylor is None else scoring.taylor[expert][:, None],
            )
        )
        for expert, (down, moments) in enumerate(_each(experts, seen))
    ]


def _each(experts: Experts, seen: Seen) -> "zip[tuple[Tensor, Moments]]":
    return zip(experts.down, seen.moments, strict=True)
