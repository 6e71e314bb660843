"""The training of masks, and of the weights if they are trained, too."""

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from numprune.errors import IntegrityError
from numprune.learning.constraint import Constraint, Lagrangian, share_of
from numprune.learning.masks import Masks, masked
from numprune.learning.rounding import Choice, rounded, sizes_under
from numprune.learning.times import TimedShare
from numprune.options import PruneOptions
from numprune.progress import Progress
from numprune.recovery.options import FINAL, measured_after
from numprune.recovery.state import Position, TrainingState
from numprune.tasks import Task
from numprune.time_budget import TimeBudget

logger = logging.getLogger(__name__)

_TOKENS_PER_STEP = 512
_WARM_UP = 0.4  # share of the steps in which the target falls
BETA = 1e-6
MASK_RATE = 0.05  # of AdamW; falls linearly to the share `FINAL`, like that of the weights
ASCENT_RATE, QUADRATIC = 0.1, 10.0  # of the multipliers
_CLIP = 1.0  # norm of the weights' gradient
_BAND = 0.01  # tolerance of the share kept by the masks around the target


@dataclass(frozen=True)
class Rounded:
    """The rounded masks of one step.

    Attributes:
        choice: what is kept.
        share: of the counted cost that the masks keep by themselves.
        in_band: that share meets the budget, within 1 %.
        divergence: of the result from the dense model, on the selection rows.
        trained: everything that is trained, as in `Training.trained`, at that step.
    """

    step: int
    choice: Choice
    share: float
    in_band: bool
    divergence: float
    trained: dict[str, Tensor]

    @property
    def rank(self) -> tuple[bool, float]:
        """Return the sort key, lowest for the best masks: they meet the budget by themselves, and diverge least."""
        return not self.in_band, self.divergence


class Training:
    """One training of masks on `student`, whose weights are also trained unless it is `dense` itself.

    Args:
        constraint: of whose cost `options.ratio` is removed.
        masks: on blocks of `student`; they are trained in place.
        rows: (N, S) for training, in this order and repeatedly.
        selection: (n, S) other rows, for evaluation.
        tokens: of the training, rounded up to whole steps.
        learning_rate: initial one of the weights.
    """

    def __init__(
        self,
        dense: PreTrainedModel,
        student: PreTrainedModel,
        constraint: Constraint,
        masks: Masks,
        rows: Tensor,
        selection: Tensor,
        options: PruneOptions,
        task: Task,
        tokens: int,
        learning_rate: float,
    ) -> None:
        self._dense, self._student, self._masks, self._task = dense, student, masks, task
        self._constraint, self._options = constraint, options
        self._rows, self._selection = rows, selection.to(dense.device)
        self._layers = student.get_submodule(constraint.anatomy.layers_path)
        self._share = (
            TimedShare.of(constraint.budget, constraint.anatomy, masks, sizes_under(constraint, options))
            if isinstance(constraint.budget, TimeBudget)
            else share_of(constraint, masks)
        )
        self._batch = max(1, _TOKENS_PER_STEP // rows.shape[1])
        self.steps = -(-tokens // (self._batch * rows.shape[1]))
        self._warm = max(1, round(_WARM_UP * self.steps))
        self._weights = [] if student is dense else list(student.parameters())
        self._rates = {"masks": MASK_RATE, "weights": learning_rate}
        groups = {"masks": [*masks.parameters()], "weights": self._weights}
        self._optimizer = torch.optim.AdamW(
            [{"params": params, "name": name} for name, params in groups.items() if params], weight_decay=0.0
        )
        self._noise = torch.Generator().manual_seed(options.seed)
        scale = self._divergence(self._at_random())
        self._lagrangian = Lagrangian(ASCENT_RATE * scale, QUADRATIC * scale)
        self._position = Position()
        self._best: Rounded | None = None

    @property
    def tokens(self) -> int:
        """The tokens of `steps`."""
        return self.steps * self._batch * self._rows.shape[1]

    @property
    def seconds(self) -> float:
        """The seconds of all steps, including those of killed processes."""
        return self._position.seconds

    @property
    def trained(self) -> dict[str, Tensor]:
        """Return everything that is trained, by name."""
        found: dict[str, Tensor] = {f"masks.{name}": value for name, value in self._masks.named_parameters()}
        if self._weights:
            found |= {f"model.{name}": value for name, value in self._student.named_parameters()}
        return found

    def run(self, state: TrainingState | None) -> Rounded:
        """Train, resuming from `state` if it is not empty, and return the best masks, which are then in `masks`.

        Raises:
            IntegrityError: the loss, or the divergence on the selection rows, is not finite.
        """
        self._resume(state)
        before, started = self._position.seconds, time.perf_counter()
        measured = measured_after(self.steps)
        with Progress(self.steps, "learn", "step", done=self._position.step) as bar:
            for step in range(self._position.step, self.steps):
                loss = self._step(step)
                self._position.step = step + 1
                if step + 1 in measured:
                    if step + 1 > self._warm or step + 1 == self.steps:
                        self._judge()
                    self._position.seconds = before + time.perf_counter() - started
                    if state is not None:
                        state.save(self._position, self._tensors())
                bar.update(note=f"loss {loss:.4f}")
        assert self._best is not None
        self._restore(self._best.trained)
        if not self._best.in_band:
            logger.warning(
                "the masks by themselves keep %.1f %% of the %s instead of %.1f %%, and were rounded; train on more "
                "tokens",
                100 * self._best.share,
                self._constraint.name,
                100 * (1 - self._options.ratio),
            )
        return self._best

    def _step(self, step: int) -> float:
        """Run a step on the next rows; return the loss before it."""
        count = self._batch
        batch = self._rows[torch.arange(step * count, (step + 1) * count) % len(self._rows)].to(self._dense.device)
        for group in self._optimizer.param_groups:
            group["lr"] = self._rates[group["name"]] * (1 - (1 - FINAL) * step / self.steps)
        with torch.no_grad():
            dense = self._output(self._dense, batch)
        with masked(self._layers, self._masks, self._masks.sample(len(batch), self._noise)):
            loss = self._task.divergence(self._output(self._student, batch), dense, batch).mean()
        if not torch.isfinite(loss):
            raise self._diverged(step + 1)
        excess = self._share.kept(self._masks) - (1 - self._options.ratio * min(1.0, (step + 1) / self._warm))
        bottleneck = BETA * (self._masks.weights @ self._masks.information)
        trained = [*self.trained.values()]
        gradients = torch.autograd.grad(
            loss + bottleneck + self._lagrangian.penalty(excess), trained, allow_unused=True
        )
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.grad = gradient
        if self._weights:
            torch.nn.utils.clip_grad_norm_(self._weights, _CLIP)
        self._optimizer.step()
        self._lagrangian.ascend(excess.item())
        return loss.item()

    def _diverged(self, step: int) -> IntegrityError:
        remedy = f"choose a learning rate below {self._rates['weights']:g}"
        if not self._weights:
            remedy = "the model's weights are damaged or overflow"
        return IntegrityError(f"training diverged at step {step} of {self.steps}: the loss is not finite; {remedy}")

    @torch.no_grad()
    def _judge(self) -> None:
        """Round the masks and evaluate the result, with masks for trained weights and without for others."""
        masks = self._masks
        choice = rounded(self._constraint, masks, self._options)
        kept = masks.indicator(choice.kept, choice.coordinates)
        divergence = self._divergence(kept * (masks.at_leaves(masks.mean) if self._weights else 1))
        if not math.isfinite(divergence):
            raise self._diverged(self._position.step)
        self._position.curve.append((self._position.step, divergence))
        copies = {name: value.detach().clone() for name, value in self.trained.items()}
        found = self._rounded(self._position.step, divergence, choice, copies)
        logger.info(
            "step %d: the masks keep %.1f %% of the %s; %.4f %s from the dense model once rounded",
            found.step,
            100 * found.share,
            self._constraint.name,
            divergence,
            self._task.unit,
        )
        if self._best is None or found.rank < self._best.rank:
            self._best, self._position.best_step = found, found.step

    @torch.no_grad()
    def _rounded(self, step: int, divergence: float, choice: Choice, trained: dict[str, Tensor]) -> Rounded:
        share = float(self._share.kept(self._masks))
        return Rounded(step, choice, share, abs(share - 1 + self._options.ratio) <= _BAND, divergence, trained)

    def _tensors(self) -> dict[str, Tensor]:
        """Return everything that the next step depends on, and the best masks and weights."""
        found = {f"now/{name}": value.detach() for name, value in self.trained.items()}
        for name, parameter in self.trained.items():
            found |= {f"{key}/{name}": value for key, value in self._optimizer.state[parameter].items()}
        if self._best is not None:
            found |= {f"best/{name}": value for name, value in self._best.trained.items()}
        found["run/multipliers"] = self._lagrangian.multipliers
        found["run/noise"] = self._noise.get_state()
        return {name: value.cpu().contiguous() for name, value in found.items()}

    def _resume(self, state: TrainingState | None) -> None:
        """Resume from the saved state, if there is one."""
        saved = state.load() if state is not None else None
        if saved is None:
            return
        self._position, tensors = saved
        logger.info("resuming training after step %d of %d", self._position.step, self.steps)
        by_kind: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition("/")
            by_kind.setdefault(kind, {})[rest] = tensor
        run = by_kind.pop("run")
        self._lagrangian.multipliers = run["multipliers"]
        self._noise.set_state(run["noise"])
        if best := by_kind.pop("best", None):
            best = {name: value.to(self._dense.device) for name, value in best.items()}
            self._restore(best)
            step = self._position.best_step
            choice = rounded(self._constraint, self._masks, self._options)
            self._best = self._rounded(step, dict(self._position.curve)[step], choice, best)
        self._restore(by_kind.pop("now"))
        for kind, values in by_kind.items():
            for name, value in values.items():
                moments = self._optimizer.state[self.trained[name]]
                moments[kind] = value if kind == "step" else value.to(self._dense.device)

    @torch.no_grad()
    def _restore(self, trained: Mapping[str, Tensor]) -> None:
        for name, parameter in self.trained.items():
            parameter.copy_(trained[name])

    def _at_random(self) -> Tensor:
        """Return (L,) of 0 and 1 that remove the share `ratio` of the leaves, at random, and at least one.

        Coordinates of the residual stream are removed only if nothing else has masks.
        """
        draw = torch.Generator().manual_seed(self._options.seed)
        chances = torch.rand(self._masks.leaves, generator=draw).to(self._masks.weights)
        if self._masks.blocks:
            self._masks.of_stream(chances).fill_(1)
        kept = (chances >= self._options.ratio).to(chances)
        kept[chances.argmin()] = 0  # nothing removed costs nothing, and the constraint would have no force
        return kept

    @torch.no_grad()
    def _divergence(self, values: Tensor) -> float:
        """Return the student's divergence from the dense model on the selection rows, with leaf factors (L,)."""
        found = []
        for batch in self._selection.split(self._batch):
            with masked(self._layers, self._masks, values[None]):
                output = self._output(self._student, batch)
            found.append(self._task.divergence(output, self._output(self._dense, batch), batch))
        return float(torch.cat(found).mean())

    def _output(self, model: PreTrainedModel, rows: Tensor) -> Tensor:
        return self._task.output(model, rows, torch.ones_like(rows))
