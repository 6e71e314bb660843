"""Masks of the variational information bottleneck (numprune/learning), trained beside the weights of a user's training.

Each unit has a mask z = mu + sigma * eps. The masks minimize the user's loss plus

    beta * sum_k w_k * 1/2 log(1 + mu_k^2 / sigma_k^2) + c (l1 (s - t) + l2 (s - t)^2)

as in numprune/learning/vib.py, except that t follows the cubic schedule: it is the share that the next removal leaves.
The masks have an optimizer of their own. c is the mean over the steps of sum_k |dL/dz_k|, the first-order change of the
loss if every unit went, so the multipliers suit every loss.
"""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from numprune.blocks import Anatomy
from numprune.learning.constraint import Constraint, Lagrangian, share_of
from numprune.learning.masks import Masked, Masks
from numprune.learning.training import ASCENT_RATE, BETA, MASK_RATE, QUADRATIC
from numprune.recovery.options import FINAL
from numprune.schedules.units import Units


class Bottleneck:
    """Scores by -log alpha = log(mu^2 / sigma^2). The remaining units are multiplied by z in training, otherwise by mu.

    One eps is drawn per unit and step. It depends only on the seed and the step, so all processes draw the same.

    Args:
        units: with gradients.
        steps: of the training.
        seed: of the masks and of eps.
    """

    def __init__(self, units: Units, anatomy: Anatomy, steps: int, seed: int) -> None:
        self._units, self._steps, self._seed = units, steps, seed
        constraint = Constraint("parameters", anatomy, 1)
        self._masks = Masks([Masked(block, constraint.of_unit(block)) for block in units.blocks], seed)
        self._share = share_of(constraint, self._masks)
        self._lagrangian = Lagrangian(ASCENT_RATE, QUADRATIC)
        self._optimizer = torch.optim.AdamW(self._masks.parameters(), MASK_RATE, weight_decay=0.0)
        self._slopes = 0.0  # sum over the steps of sum_k |dL/dz_k|

    @torch.no_grad()
    def factors(self, step: int | None) -> Tensor:
        return self._masks.mean.clone() if step is None else self._sample(step)

    def _sample(self, step: int) -> Tensor:
        # torch's generator uses only 32 bits of a seed.
        digest = hashlib.sha256(f"{self._seed} {step}".encode()).digest()
        return self._masks.sample(1, torch.Generator().manual_seed(int.from_bytes(digest[:4], "little")))[0]

    def collect(self, step: int, target: float) -> None:
        """Train the masks, those of removed units as if they multiplied them: a removed unit can come back."""
        slopes = self._units.gradients(step)
        self._slopes += float(slopes.abs().sum())
        masks = self._masks
        excess = self._share.kept(masks) - target
        penalty = self._slopes / step * self._lagrangian.penalty(excess)
        # The gradient of slopes @ z with respect to mu and log sigma^2 is that of the loss.
        loss = slopes @ self._sample(step) + BETA * (masks.weights @ masks.information) + penalty
        self._optimizer.zero_grad()
        loss.backward()
        for group in self._optimizer.param_groups:
            group["lr"] = MASK_RATE * (1 - (1 - FINAL) * (step - 1) / self._steps)
        self._optimizer.step()
        self._lagrangian.ascend(excess.item())

    @torch.no_grad()
    def scores(self, step: int) -> Tensor:
        return -self._masks.log_alpha

    def state(self) -> dict[str, Tensor]:
        found = {name: value.detach() for name, value in self._masks.named_parameters()}
        for name, value in self._masks.named_parameters():
            found |= {f"{key}/{name}": moment for key, moment in self._optimizer.state.get(value, {}).items()}
        slopes = torch.tensor(self._slopes, dtype=torch.float64)
        return found | {"multipliers": self._lagrangian.multipliers, "slopes": slopes}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        for name, value in self._masks.named_parameters():
            value.copy_(state[name])
            moments = {key: state[f"{key}/{name}"].clone() for key in ("step", "exp_avg", "exp_avg_sq")}
            self._optimizer.state[value] = moments
        self._lagrangian.multipliers = state["multipliers"]
        self._slopes = float(state["slopes"])
