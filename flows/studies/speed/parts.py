"""The parts of pruning that are not implemented as published, timed against the published form."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from numprune.criteria.numerical import boxed_mask, error_matrix, relaxed_mask
from numprune.criteria.obs import greedy_removal
from numprune.flows.studies.speed import straightforward
from numprune.flows.studies.speed.clock import seconds, seconds_of_steps
from numprune.moments import Moments

_RATIO = 0.3
_ITERATIONS = 50
_BATCHES, _BATCH = 4, 2048  # tokens of the Gram matrix


@dataclass(frozen=True)
class Part:
    """Medians of both implementations, run in turns.


    Attributes:
        name: what is computed.
        channels: D.
        straightforward_seconds: of the published form.
        share_run: of the published form; the rest was extrapolated from equal steps.
        seconds: numprune's.
    """

    name: str
    channels: int
    straightforward_seconds: float
    share_run: float
    seconds: float

    @property
    def speedup(self) -> float:
        return self.straightforward_seconds / self.seconds


@dataclass(frozen=True)
class _Pair:
    name: str
    printed: Callable[[], Generator[None, None, Any]]
    steps: int
    ours: Callable[[], Any]


def measure_parts(
    channels: Sequence[int], repeats: int, patience: float, device: torch.device, progress: Callable[[str], None]
) -> list[Part]:
    """Return every part at every number of channels.

    Args:
        channels: D of each size.
        repeats: runs of both, in turns.
        patience: seconds after which the published form is stopped and its time extrapolated.
        device: to run on.
        progress: told what comes next.
    """
    for pair in _pairs(64, device):  # libraries are loaded on first use
        seconds_of_steps(pair.printed(), pair.steps, 0, device)
        pair.ours()
    parts = []
    for D in channels:
        for pair in _pairs(D, device):
            progress(f"{pair.name}, {D} channels")
            runs = [
                (*seconds_of_steps(pair.printed(), pair.steps, patience, device), seconds(pair.ours, device))
                for _ in range(repeats)
            ]
            printed, shares, ours = zip(*runs, strict=True)
            parts.append(Part(pair.name, D, median(printed), min(shares), median(ours)))
    return parts


def _pairs(D: int, device: torch.device) -> list[_Pair]:
    """The parts at D channels and 3/8 D outputs, as in a Llama's MLP."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype, device=device)

    weight, factor = normal(max(1, 3 * D // 8), D), normal(D, max(1, D // 4))
    gram = factor @ factor.T / factor.shape[1]
    gram.diagonal().add_(torch.rand(D, generator=generator, dtype=torch.float64, device=device))
    A = error_matrix(weight, gram)
    batches = [normal(_BATCH, D, dtype=torch.float32) for _ in range(_BATCHES)]

    def newton() -> Generator[None, None, Tensor]:
        return straightforward.newton(A, _RATIO, iterations=_ITERATIONS)

    def accumulate() -> Tensor:
        moments = Moments(D, device=device)
        for batch in batches:
            moments.add(batch)
        return moments.gram

    return [
        _Pair("numerical score as published", newton, _ITERATIONS, lambda: relaxed_mask(A, _RATIO)),
        _Pair("numerical score, mask held in [0, 1]", newton, _ITERATIONS, lambda: boxed_mask(A, _RATIO)),
        _Pair("greedy OBS", lambda: straightforward.removal(weight, gram), D, lambda: greedy_removal(weight, gram, 1)),
        _Pair(
            f"Gram matrix of {_BATCHES * _BATCH} tokens", lambda: straightforward.gram(batches), _BATCHES, accumulate
        ),
    ]
