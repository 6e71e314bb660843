"""Distillation: AdamW on float32 weights, a cosine schedule, and the best step on held-back rows."""

import importlib.util
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from numprune.anatomy import layers_path, read_anatomy
from numprune.blocks import Anatomy
from numprune.errors import InputError, IntegrityError
from numprune.placement import is_spread, place
from numprune.progress import Progress
from numprune.recovery.lora import Adapters
from numprune.recovery.loss import Distillation
from numprune.recovery.options import COPIES, RecoveryOptions, RowOrder, learning_rate_factor, measured_after
from numprune.recovery.prices import block_prices
from numprune.recovery.rows import RecoveryRows
from numprune.recovery.state import Position, TrainingState
from numprune.recovery.weights import Trained, Weights
from numprune.tasks import CAUSAL, Task

logger = logging.getLogger(__name__)

_BETAS = (0.9, 0.95)
_CLIP = 1.0  # of the gradient's norm
_PRICED_ROWS = 8  # that blocks are chosen by


@dataclass(frozen=True)
class Recovered:
    """The result of a training.

    Attributes:
        steps, tokens: of the training.
        learning_rate: peak learning rate.
        best_step: the step whose weights the model has now; 0: those before training, because no step was better.
        kl_before, kl_after: divergence from the dense model on the selection rows: KL or, for embeddings, 1 - cosine.
        unit: of that divergence, that of the task's loss.
        seconds: of steps and measurements, including those of killed processes.
        parameters: number of trained parameters.
        blocks: if only some were trained: name -> price of their pruning, in that unit.
    """

    steps: int
    tokens: int
    learning_rate: float
    best_step: int
    kl_before: float
    kl_after: float
    unit: str
    seconds: float
    parameters: int
    blocks: dict[str, float]


def require_packages(options: RecoveryOptions) -> None:
    """Raise InputError if accelerate or, for LoRA, peft is not installed."""
    for package in ("accelerate", *(["peft"] if options.train == "lora" else [])):
        if importlib.util.find_spec(package) is None:
            raise InputError(f'training needs the package {package}: pip install "numprune[learn]"')


def check_training(options: RecoveryOptions, model: Anatomy, dense: Anatomy, dropped: Sequence[int] = ()) -> None:
    """Raise InputError if `model`, pruned from `dense` without its `dropped` layers, cannot be trained like this."""
    if options.top_k is not None and options.top_k < 1:
        raise InputError(f"top_k is {options.top_k}; it must be at least 1, or None for the whole vocabulary")
    if not 0 <= options.hidden_weight < math.inf:
        raise InputError(f"hidden_weight is {options.hidden_weight:g}; it must be at least 0, and finite")
    if options.top_k is not None and model.task != CAUSAL.name:
        raise InputError(f"top_k: only for causal language models, and the model is for {model.task}; leave it out")
    left = dense.layers - len(dropped)
    for name, ours, theirs in (
        ("hidden size", model.hidden_size, dense.hidden_size),
        ("number of layers", model.layers, left),
    ):
        if options.hidden_weight and ours != theirs:
            raise InputError(
                f"hidden_weight: hidden states cannot be compared, because the {name} is {ours}, and {theirs} in the "
                "dense model; leave it out"
            )


def distill(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    rows: RecoveryRows,
    options: RecoveryOptions,
    device: torch.device,
    *,
    stored: Mapping[str, torch.dtype] | None = None,
    dropped: Sequence[int] = (),
    state: TrainingState | None = None,
    task: Task = CAUSAL,
) -> Recovered:
    """Train `model`, which was pruned from `dense`, towards it, in place. Both are in evaluation mode, without dropout.

    The weights are those of the best step on the selection rows, including the step before training, so on those rows
    the result is never worse. On a CPU, and with the same number of processes, it is bit-identical whether or not a
    process was killed and resumed from `state`.

    Args:
        model: in float32.
        dense: with the same vocabulary; it is not modified.
        device: for training. Models that exceed one GPU are spread over all, but processes started by `accelerate
            launch` have a GPU each.
        stored: stored data types of weights, if not float32: each step is evaluated with the weights as stored, and a
            GPU computes in bfloat16.
        dropped: layers of `dense` that `model` does not have.
        state: for resuming, saved after each measurement.
        task: of the models; rows of a masked language model are masked.

    Raises:
        InputError: a package is missing, or the options do not fit together or the models.
        IntegrityError: the loss is not finite, or adapters cannot be merged without changing the model.
    """
    require_packages(options)
    check_training(options, read_anatomy(model.config), read_anatomy(dense.config), dropped)
    return _Training(model, dense, rows, options, device, stored or {}, dropped, task).run(state)


class _Training:
    """One training: its models, its optimizer and its progress."""

    def __init__(
        self,
        model: PreTrainedModel,
        dense: PreTrainedModel,
        rows: RecoveryRows,
        options: RecoveryOptions,
        device: torch.device,
        stored: Mapping[str, torch.dtype],
        dropped: Sequence[int],
        task: Task,
    ) -> None:
        from accelerate import Accelerator

        self._rows, self._options, self._stored = rows, options, stored
        in_half = device.type != "cpu" and any(dtype.itemsize < 4 for dtype in stored.values())
        self._processes = Accelerator(cpu=device.type == "cpu", mixed_precision="bf16" if in_half else "no")
        if options.batch_size % self._processes.num_processes:
            raise InputError(
                f"{self._processes.num_processes} processes cannot share steps of {options.batch_size} rows; choose a "
                "batch size that they divide"
            )
        where = device if self._processes.num_processes == 1 else self._processes.device
        copies = COPIES if options.train == "all" else 1
        self._model = model
        for one in (model, dense):
            if not is_spread(one):
                place(one, where, models=1 + copies)
        if options.train == "blocks" and (is_spread(model) or is_spread(dense)):
            raise InputError(
                "train blocks replaces blocks of the dense model by pruned ones to price them, so it needs a GPU with "
                "room for both models; train all weights, or use lora"
            )
        self._blocks: dict[str, float] = {}
        self._trained: Trained
        if options.train == "lora":
            self._trained = Adapters(model, options.rank, options.seed, task)
        elif options.train == "blocks":
            priced = rows.training[:_PRICED_ROWS]
            prices = block_prices(model, dense, priced, dropped, options.micro_batch_size, task)
            self._blocks = dict(islice(prices.items(), options.blocks))
            self._trained = Weights(model, self._blocks)
        else:
            self._trained = Weights(model)
        self._weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self._rate = options.rate(model.config.hidden_size)
        self._optimizer = torch.optim.AdamW(self._weights.values(), self._rate, _BETAS, weight_decay=0.0)
        self._divergence = Distillation(model, dense, task)
        loss = Distillation(
            model, dense, task, top_k=options.top_k, hidden_weight=options.hidden_weight, dropped=dropped
        )
        self._loss: nn.Module = self._processes.prepare_model(loss, device_placement=not is_spread(model))
        self._length = rows.training.shape[1]
        self._predictions = task.predictions_in(self._length)  # of a row
        self._unit = task.unit
        self._steps = options.steps(self._length)
        self._position = Position()
        self._best = self._rounded()

    def run(self, state: TrainingState | None) -> Recovered:
        self._resume(state)
        order = RowOrder(len(self._rows.training), self._options.batch_size, self._options.seed)
        measured = measured_after(self._steps)
        before = time.perf_counter()
        if not self._position.curve:
            self._measure()
        with (
            Progress(self._steps, "recover", "step", done=self._position.step) as bar,
            _checkpointed(self._model) if self._options.gradient_checkpointing else nullcontext(),
        ):
            for step in range(self._position.step, self._steps):
                started = time.perf_counter()
                loss = self._step(step, order.batch(step))
                speed = self._options.batch_size * self._length / (time.perf_counter() - started)
                self._position.step = step + 1
                if step + 1 in measured:
                    self._measure()
                    if state is not None and self._processes.is_main_process:
                        spent = self._position.seconds + time.perf_counter() - before
                        state.save(replace(self._position, seconds=spent), self._tensors())
                bar.update(note=f"loss {loss:.4f}, {speed:,.0f} tokens/s")
        self._trained.finish(self._best)
        curve = self._position.curve
        return Recovered(
            steps=self._steps,
            tokens=self._steps * self._options.batch_size * self._length,
            learning_rate=self._rate,
            best_step=self._position.best_step,
            kl_before=curve[0][1],
            kl_after=dict(curve)[self._position.best_step],
            unit=self._unit,
            seconds=self._position.seconds + time.perf_counter() - before,
            parameters=sum(weight.numel() for weight in self._weights.values()),
            blocks=self._blocks,
        )

    def _step(self, step: int, batch: list[int]) -> float:
        """Train on these rows; return the mean loss before the step, for each prediction."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate * learning_rate_factor(step, self._steps)
        mine = batch[self._processes.process_index :: self._processes.num_processes]
        starts = range(0, len(mine), self._options.micro_batch_size)
        loss = torch.zeros((), dtype=torch.float64, device=self._model.device)
        for start in starts:
            part = self._rows.training[mine[start : start + self._options.micro_batch_size]]
            last = start == starts[-1]
            # Processes exchange gradients once a step, and each has the mean over all of them.
            with nullcontext() if last else self._processes.no_sync(self._loss):
                found = self._loss(part.to(self._model.device)) / (len(mine) * self._predictions)
                self._processes.backward(found)
            loss += found.detach()
        norm = nn.utils.clip_grad_norm_(self._weights.values(), _CLIP)
        mean = float(self._processes.reduce(loss, "mean"))
        if not (math.isfinite(mean) and math.isfinite(float(norm))):
            raise IntegrityError(
                f"training diverged at step {step + 1} of {self._steps}: the loss is {mean:g}, its gradient's norm "
                f"{float(norm):g}; choose a learning rate below {self._rate:g}"
            )
        self._optimizer.step()
        self._optimizer.zero_grad()
        return mean

    def _measure(self) -> None:
        """Record the divergence on the selection rows, and the weights if it is the lowest so far."""
        position, rounded = self._position, self._rounded()
        with self._trained.replaced(rounded):
            divergence = self._selection_divergence()
        lowest = min((value for _, value in position.curve), default=math.inf)
        position.curve.append((position.step, divergence))
        if divergence < lowest:  # never of a divergence that is NaN
            if position.step:  # before the first step adapters change nothing
                self._trained.check(self._rows.selection[: self._options.micro_batch_size].to(self._model.device))
            position.best_step, self._best = position.step, rounded

    @torch.no_grad()
    def _selection_divergence(self) -> float:
        selection, size = self._rows.selection, self._options.micro_batch_size
        total = torch.zeros((), dtype=torch.float64, device=self._model.device)
        mine = selection[self._processes.process_index :: self._processes.num_processes]
        for part in mine.split(size) if len(mine) else ():  # with fewer rows than processes, some have none
            total += self._divergence(part.to(self._model.device))
        return float(self._processes.reduce(total, "sum")) / (len(selection) * self._predictions)

    def _rounded(self) -> dict[str, Tensor]:
        """Return copies of the weights in their stored data types, on the CPU."""
        return {
            name: weight.to(self._stored.get(name, weight.dtype), copy=True).cpu()
            for name, weight in self._trained.merged().items()
        }

    def _tensors(self) -> dict[str, Tensor]:
        """Return everything that the next step depends on, and the best weights."""
        found = {f"weights/{name}": weight.detach() for name, weight in self._weights.items()}
        found |= {f"best/{name}": weight for name, weight in self._best.items()}
        for name, weight in self._weights.items():
            found |= {f"{key}/{name}": value for key, value in self._optimizer.state.get(weight, {}).items()}
        return {name: tensor.cpu().contiguous() for name, tensor in found.items()}

    def _resume(self, state: TrainingState | None) -> None:
        """Resume from the saved state, if there is one."""
        saved = state.load() if state is not None else None
        done = torch.tensor([saved[0].step if saved else 0], device=self._model.device)
        steps = sorted({*self._processes.gather(done).tolist()})
        if len(steps) > 1:
            raise InputError(
                f"the processes would resume after different steps: {', '.join(map(str, steps))}; they need a file "
                "system that all of them share"
            )
        if saved is None:
            return
        self._position, tensors = saved
        logger.info("resuming training after step %d of %d", self._position.step, self._steps)
        by_kind: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            kind, _, weight = name.partition("/")
            by_kind.setdefault(kind, {})[weight] = tensor
        with torch.no_grad():
            for name, value in by_kind.pop("weights").items():
                self._weights[name].copy_(value)
        self._best = by_kind.pop("best")
        for kind, values in by_kind.items():
            for name, value in values.items():
                moments: dict[str, Any] = self._optimizer.state[self._weights[name]]
                moments[kind] = value if kind == "step" else value.to(self._weights[name].device)


@contextmanager
def _checkpointed(model: PreTrainedModel) -> Iterator[None]:
    """Make each layer recompute its activations for the gradient instead of keeping them.

    transformers' own implementation needs training mode, which enables dropout.
    """
    layers: Any = model.get_submodule(layers_path(model.config))
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
