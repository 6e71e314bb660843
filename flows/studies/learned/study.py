"""The rows of the table, each made by stages that are kept in a workspace: what is finished is not made again."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from numprune.counted import counted
from numprune.export.manifest import folder_digest
from numprune.flows import names
from numprune.flows.names import CHECKPOINT
from numprune.flows.sections import Learn, Prune, Recover
from numprune.flows.stages import Artifact, Stage, StageResult, Text, run_stage
from numprune.flows.steps.bodies.candidate import make_learned, make_recovered
from numprune.flows.steps.bodies.evaluation import make_baseline, make_quality
from numprune.flows.steps.prune import device_of
from numprune.flows.steps.results import PrunedCheckpoint
from numprune.flows.steps.text import text_digest
from numprune.flows.studies.learned import steps
from numprune.served import AS_STORED
from numprune.serving.report import Quality
from numprune.target import Target

R = TypeVar("R")

_REFITS: tuple[names.Compensation, ...] = ("none", "joint")
_TRAINING_FREE: tuple[names.Allocation, ...] = ("uniform", "error")


@dataclass(frozen=True)
class Request:
    """Masks to learn."""

    variant: names.LearningVariant
    tokens: int

    def __str__(self) -> str:
        """The variant, with its tokens if they are not the default."""
        own = self.tokens == names.LEARNING_TOKENS[self.variant]
        return self.variant if own else f"{self.variant}={self.tokens}"

    @property
    def asked(self) -> Learn:
        return Learn(method="vib", variant=self.variant, tokens=self.tokens)


@dataclass(frozen=True)
class Row:
    """One method at one ratio.

    Attributes:
        removed: share of the prunable parameters.
        tokens: for training; 0 without training.
        seconds: of learning, pruning and distillation.
        quality: the report's section, against the dense model.
    """

    method: str
    ratio: float
    removed: float
    parameters: int
    tokens: int
    seconds: float
    quality: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class _Made:
    """A pruned checkpoint, its sizes and its cost."""

    method: str
    checkpoint: Artifact
    found: PrunedCheckpoint
    tokens: int
    seconds: float


def limits(ratio: float) -> dict[str, Any]:
    """Return what masks may remove: fields of section prune."""
    section = Prune(ratio=ratio, allocation="error", axes=[*names.LEARNED_AXES])
    return section.model_dump(include={*names.LEARNED_LIMITS})


class Study:
    """One model and its texts.

    Args:
        workspace: for the stages.
        samples: calibration rows; `windows`: held-out rows at most; `length`: tokens of a row.
        distilled: how to distil the best models of a ratio; None: not at all.

    Raises:
        InputError: a text cannot be read, or is too short.
    """

    def __init__(
        self,
        workspace: Path,
        base: Path,
        text: str | list[str],
        heldout: str | list[str],
        samples: int,
        windows: int,
        length: int,
        distilled: Recover | None,
    ) -> None:
        self._workspace, self._length = workspace, length
        self._base, self._device = Artifact(base, folder_digest(base)), device_of("auto").type
        self._asked = distilled
        self._text = Text(text, text_digest(text, "train"))
        drawn = self._made(
            Stage.of(
                "text",
                "studies",
                steps.make_text,
                model=self._base,
                text=self._text,
                heldout=Text(heldout, text_digest(heldout, "heldout")),
                samples=samples,
                windows=windows,
                sequence_length=length,
                distilled=distilled,
            )
        )
        found = drawn.facts
        self._calibration = Artifact(drawn.path / steps.CALIBRATION, found.calibration.digest)
        self._heldout = Artifact(drawn.path / steps.HELDOUT, found.heldout.digest)
        self._distilled_on = None
        if found.distillation:
            self._distilled_on = Artifact(drawn.path / steps.DISTILLATION, found.distillation.digest)
        self.conditions = (
            f"{samples} calibration rows of {length} tokens; quality on {found.heldout.tokens:,} tokens of "
            f"{counted(found.heldout.documents, 'held-out document')}."
        )
        self._scores = self._made(
            Stage.of(
                "baseline",
                "export",
                make_baseline,
                model=self._base,
                rows=self._heldout,
                rows_digest=self._heldout.digest,
                prompts=[],
                device=self._device,
            )
        ).artifact

    def rows(self, ratio: float, requests: Sequence[Request]) -> Iterator[Row]:
        """Yield the rows of a ratio: training-free methods, learned masks, and the distilled models."""
        made: list[_Made] = []
        learned = (self._learned(request, ratio) for request in requests)
        for one in chain(self._training_free(ratio), *learned):
            made.append(one)
            yield self._row(one, ratio)
        for one in self._distilled(made):
            yield self._row(one, ratio)

    def _training_free(self, ratio: float) -> Iterator[_Made]:
        for allocation in _TRAINING_FREE:
            asked = Prune(ratio=ratio, allocation=allocation)
            yield self._pruned(f"obs/{allocation}/joint", self._base, None, asked)

    def _learned(self, request: Request, ratio: float) -> Iterator[_Made]:
        """Learn once, and apply the plan with each refit."""
        rows = self._made(
            Stage.of(
                "learning-rows",
                "studies",
                steps.make_learning_rows,
                model=self._base,
                text=self._text,
                heldout=self._heldout,
                distilled=self._distilled_on,
                asked=request.asked,
                sequence_length=self._length,
            )
        )
        learned = self._made(
            Stage.of(
                "learn",
                "export",
                make_learned,
                base=self._base,
                rows=rows.artifact,
                times=None,
                asked=request.asked,
                limits=limits(ratio),
                target=Target(),
                served=AS_STORED,
                device=self._device,
            )
        )
        plan, base = Artifact(learned.path / names.LEARNED, learned.facts.digest), self._base
        if learned.facts.model:
            base = Artifact(plan.path / names.LEARNED_MODEL, learned.facts.model)
        for refit in _REFITS:
            pruned = self._pruned(f"vib {request}/{refit}", base, plan, Prune(compensation=refit))
            yield replace(pruned, tokens=learned.facts.tokens, seconds=learned.facts.seconds + pruned.seconds)

    def _pruned(self, method: str, base: Artifact, learned: Artifact | None, asked: Prune) -> _Made:
        made = self._made(
            Stage.of(
                "prune",
                "studies",
                steps.make_pruned,
                base=base,
                origin=self._base,
                rows=self._calibration,
                learned=learned,
                asked=asked,
                device=self._device,
            )
        )
        found = made.facts.checkpoint
        return _Made(method, Artifact(made.path / CHECKPOINT, found.digest), found, 0, made.facts.seconds)

    def _distilled(self, made: Sequence[_Made]) -> Iterator[_Made]:
        """Distil the best model, and the best training-free one, which may be the same."""
        if self._distilled_on is None or self._asked is None:
            return
        found = {one: self._divergence(one.checkpoint, self._distilled_on) for one in made}
        of_each = (made, made[: len(_TRAINING_FREE)])
        for source in dict.fromkeys(min(some, key=lambda one: found[one]) for some in of_each):
            trained = self._made(
                Stage.of(
                    "recover",
                    "export",
                    make_recovered,
                    source=source.checkpoint,
                    dense=self._base,
                    rows=self._distilled_on,
                    asked=self._asked,
                    device=self._device,
                )
            )
            yield _Made(
                f"{source.method} + distillation",
                Artifact(trained.path / CHECKPOINT, trained.facts.digest),
                source.found,
                source.tokens + trained.facts.tokens,
                source.seconds + trained.facts.seconds,
            )

    def _divergence(self, candidate: Artifact, rows: Artifact) -> float:
        return self._made(
            Stage.of(
                "divergence",
                "studies",
                steps.make_divergence,
                candidate=candidate,
                dense=self._base,
                rows=rows,
                device=self._device,
            )
        ).facts

    def _row(self, made: _Made, ratio: float) -> Row:
        quality = self._made(
            Stage.of(
                "quality",
                "serving",
                make_quality,
                candidate=made.checkpoint,
                unquantized=None,
                pruned=None,
                trained=None,
                baseline=self._base,
                scores=self._scores,
                rows=self._heldout,
                rows_digest=self._heldout.digest,
                prompts=[],
                device=self._device,
            )
        ).facts
        return Row(
            made.method,
            ratio,
            made.found.prunable_ratio_removed,
            made.found.after.parameters,
            made.tokens,
            made.seconds,
            quality.model_dump(mode="json"),
        )

    def _made(self, stage: Stage[R]) -> StageResult[R]:
        return run_stage(self._workspace, stage)


def markdown(rows: Sequence[Row], conditions: str) -> str:
    """The table."""
    header = [
        "ratio",
        "method",
        "removed",
        "parameters",
        "tokens trained",
        "seconds",
        "NLL increase (95 % interval)",
        "KL",
    ]
    lines = [f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
    for row in rows:
        quality = Quality.model_validate(row.quality)
        lower, upper = quality.loss_delta.interval95
        cells = [f"{row.ratio:.0%}", row.method, f"{row.removed:.1%}", f"{row.parameters:,}", f"{row.tokens:,}"]
        cells += [f"{row.seconds:,.0f}", f"{quality.loss_delta.value:+.4f} [{lower:+.4f}, {upper:+.4f}]"]
        cells.append(f"{quality.kl_nats_per_token:.4f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", conditions, ""])
