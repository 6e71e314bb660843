"""The trainings of the study. Each is written to disk as soon as it is finished.

A ticket is what magnitude pruning keeps of a trained model, as the model was after step k of its training, with the
optimizer's moments (Frankle et al., ICML 2020, arXiv 1912.05671). It is trained to the end, pruned again, and so on. It
is compared with the same shape, initialised anew and trained from the first step, and with as many random units (or
weights), rewound to step k, too.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from numprune.allocation import uniform
from numprune.anatomy import read_anatomy
from numprune.budget import budget_of
from numprune.corpus import rows_digest
from numprune.counted import counted
from numprune.errors import InputError
from numprune.flows.stages import code_version
from numprune.flows.studies.tickets.masks import Masks, Pruning, UnitPruning, WeightPruning, everything, share_left
from numprune.flows.studies.tickets.training import BATCH_SIZE, LENGTH, Training, build, heldout_nll, state_of
from numprune.options import PruneOptions, sizes_allowed
from numprune.progress import Progress
from numprune.recovery.state import Position, TrainingState

Kind = Literal["dense", "ticket", "reinitialised", "random"]
RIVALS: tuple[Kind, ...] = ("ticket", "reinitialised", "random")
_APART = 1 << 20  # keeps seeds of new weights and of draws apart from those of the dense models
_REWOUND = "rewound/"  # names of a dense model's state after step k


@dataclass(frozen=True)
class Settings:
    """The settings that, with the text, determine the results.

    Attributes:
        steps: per training.
        rewind: k, the step to which tickets are rewound.
        fraction: share of the remaining units (or weights) to remove after each training.
        structured: whole units are removed; otherwise single weights.
    """

    steps: int
    rewind: int
    fraction: float
    structured: bool

    def share(self, rounds: int) -> float:
        """Return the share of the prunable parameters that is left after so many rounds."""
        return float((1 - self.fraction) ** rounds)

    def pruning(self, rounds: int) -> Pruning:
        """Return the pruning of units or weights.

        Raises:
            InputError: the last round would remove more than can be removed.
        """
        if not self.structured:
            return WeightPruning()
        anatomy = read_anatomy(build(0).config)
        allowed = sizes_allowed(anatomy, PruneOptions(0.0))
        try:
            uniform(anatomy, 1 - self.share(rounds), allowed)
        except InputError as error:
            raise InputError(f"{rounds} rounds of {self.fraction:g} are too many: {error}") from None
        return UnitPruning(anatomy, allowed)


@dataclass(frozen=True)
class Result:
    """One training.

    Attributes:
        kept: share of the prunable parameters.
        nll: of the held-out text, nats per byte.
    """

    kind: Kind
    seed: int
    round: int
    kept: float
    nll: float
    seconds: float


class Study:
    """All trainings with the same settings. Raises InputError as `Settings.pruning`."""

    def __init__(self, settings: Settings, rounds: int, seeds: Sequence[int], rows: Tensor, heldout: Tensor) -> None:
        self._settings, self._rounds, self._seeds = settings, rounds, seeds
        self._rows, self._heldout = rows, heldout
        self._anatomy = read_anatomy(build(0).config)
        self._pruning = settings.pruning(rounds)

    @property
    def conditions(self) -> str:
        """The conditions of the table's figures, in one sentence."""
        settings, prunable = self._settings, budget_of(self._anatomy).prunable_parameters
        what = "KV groups and MLP channels, as many in every layer" if settings.structured else "single weights"
        return (
            f"A Llama over bytes with {prunable:,} prunable parameters; {settings.steps} steps of "
            f"{BATCH_SIZE * LENGTH:,} bytes, tickets rewound to step {settings.rewind}; {what}, "
            f"{100 * settings.fraction:g} % of what is left a round; {counted(len(self._seeds), 'seed')}; NLL on "
            f"{self._heldout.numel():,} held-out bytes."
        )

    def run(self, out: Path) -> list[Result]:
        """Return the results of all trainings. Their files are kept in `out`, and finished ones are not repeated."""
        rounds = range(1, self._rounds + 1)
        kinds: list[tuple[Kind, int]] = [("dense", 0), *((kind, number) for number in rounds for kind in RIVALS)]
        every = [(kind, seed, number) for seed in self._seeds for kind, number in kinds]
        missing = [kind for kind, seed, number in every if self._state(out, kind, seed, number).load() is None]
        with Progress(sum(map(self._steps, missing)), "train", "step") as bar:
            return [result for seed in self._seeds for result in self._of_seed(out, seed, bar)]

    def _of_seed(self, out: Path, seed: int, bar: Progress) -> Iterator[Result]:
        masks = everything(self._anatomy)
        dense, result = self._trained(out, "dense", seed, 0, masks, {}, bar)
        yield result
        rewound = {name.removeprefix(_REWOUND): tensor for name, tensor in dense.items() if name.startswith(_REWOUND)}
        trained = {name: tensor for name, tensor in dense.items() if not name.startswith(_REWOUND)}
        model = build(seed)
        for number in range(1, self._rounds + 1):
            model.load_state_dict(trained, strict=False)  # tied weights are stored once
            masks = self._pruning.smaller(model, masks, self._settings.share(number))
            trained, result = self._trained(out, "ticket", seed, number, masks, rewound, bar)
            yield result
            yield self._trained(out, "reinitialised", seed, number, masks, {}, bar)[1]
            drawn = self._pruning.random(masks, torch.Generator().manual_seed(seed * _APART + number))
            yield self._trained(out, "random", seed, number, drawn, rewound, bar)[1]

    def _trained(
        self, out: Path, kind: Kind, seed: int, number: int, masks: Masks, start: Mapping[str, Tensor], bar: Progress
    ) -> tuple[dict[str, Tensor], Result]:
        """Return weights and result of a training from `start` (empty: as initialised); a finished one is read."""
        state = self._state(out, kind, seed, number)
        found = state.load()
        if found is None:
            found = self._train(kind, seed, number, masks, start, bar)
            state.save(*found)
        position, tensors = found
        return tensors, Result(kind, seed, number, share_left(masks), position.curve[-1][1], position.seconds)

    def _train(
        self, kind: Kind, seed: int, number: int, masks: Masks, start: Mapping[str, Tensor], bar: Progress
    ) -> tuple[Position, dict[str, Tensor]]:
        started = time.perf_counter()
        model = build(seed if kind != "reinitialised" else (seed + 1) * _APART + number)
        steps, rewind = self._settings.steps, self._settings.rewind
        rewound = state_of(model) if kind == "dense" and rewind == 0 else {}

        def after(step: int, optimizer: Optimizer) -> None:
            if kind == "dense" and step == rewind:
                rewound.update(state_of(model, optimizer))
            bar.update(note=f"seed {seed}, round {number}, {kind}")

        Training(self._rows, steps, seed).run(model, masks, steps - self._steps(kind), start, after)
        tensors = {f"{_REWOUND}{name}": tensor for name, tensor in rewound.items()} | state_of(model)
        nll = heldout_nll(model, self._heldout)
        return Position(steps, time.perf_counter() - started, steps, [(steps, nll)]), tensors

    def _steps(self, kind: Kind) -> int:
        return self._settings.steps - (self._settings.rewind if kind in ("ticket", "random") else 0)

    def _state(self, out: Path, kind: Kind, seed: int, number: int) -> TrainingState:
        texts = [rows_digest(self._rows), rows_digest(self._heldout)]
        decides = [asdict(self._settings), *texts, kind, seed, number, code_version("studies")]
        identity = hashlib.sha256(json.dumps(decides).encode()).hexdigest()
        return TrainingState(out / "trainings" / f"{kind}-{seed}-{number}-{identity[:12]}", identity)
