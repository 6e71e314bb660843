"""Run a comparison: shared work once, each method in its own process, and existing results reused.

A separate process gives each method its own peak memory. Shared data go through files: token rows, the dense model's
moments and gradients (read block by block), and its last hidden states on the held-out rows. Methods that use the
pruned prefix run the dense model beside it, because recomputing the outputs of all blocks is cheaper than reading them.

All shared data and every finished method are stages (see flows/stages.py), so a killed run resumes where it stopped,
and results from other weights, text, options or code are never reused.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from numprune.anatomy import read_anatomy
from numprune.budget import budget_of
from numprune.documents import Reading
from numprune.errors import InputError, NumpruneError
from numprune.export import locks
from numprune.export.checkpoint import read_config
from numprune.export.manifest import folder_digest
from numprune.export.tasks import load_task
from numprune.flows import children, stages
from numprune.flows.stages import Artifact, Stage, StageResult, Text
from numprune.flows.steps.text import named, require_held_out, text_digest
from numprune.flows.studies.compare import steps
from numprune.flows.studies.compare.methods import reads_dense_moments, reads_gradients
from numprune.flows.studies.compare.plot import as_svg
from numprune.flows.studies.compare.steps import SharedPass
from numprune.flows.studies.compare.table import Conditions, Row, Table, as_csv, as_markdown

R = TypeVar("R")

FILES: Mapping[str, Callable[[Table], str]] = {
    "compare.csv": as_csv,
    "compare.md": as_markdown,
    "compare.svg": as_svg,
}


@dataclass(frozen=True)
class Request:
    """What to compare.

    Attributes:
        model: folder of the dense model.
        name: of the model in the table.
        text: calibration text: files, or the embedded one.
        reading: how both texts are converted to rows.
        heldout: files, the embedded one, or None: the last fifth of the calibration text, excluded from calibration.
        ratios, methods, samples: one row for each combination.
        axes: what may be pruned.
        out: folder for the results and the stages.
    """

    model: Path
    name: str
    text: str | list[str]
    heldout: str | list[str] | None
    reading: Reading
    ratios: Sequence[float]
    methods: Sequence[str]
    samples: Sequence[int]
    sequence_length: int
    align: int
    axes: tuple[str, ...]
    seed: int
    device: str
    out: Path


def compare(request: Request) -> Table:
    """Return the table; it is also written to `request.out` as CSV, Markdown and SVG after each method.

    Raises:
        InputError: invalid text, model or options, or another comparison is running in `request.out`.
        NumpruneError: names the methods that failed, after all others have run and been written.
    """
    if request.heldout:
        with named("--heldout"):
            require_held_out(request.heldout, request.text, "--text")
    with _alone(request.out):
        stages.sweep(request.out)
        run = _Comparison(request)
        rows: list[Row] = []
        failed: list[str] = []
        for finished in _in_turn(request, run):
            if isinstance(finished, Row):
                rows.append(finished)
            else:
                failed.append(finished)
            if rows:
                for name, form in FILES.items():
                    _write(request.out / name, form(Table(run.conditions, rows)))
        if failed:
            raise NumpruneError("\n".join(["these methods failed; all others are in the table:", *failed]))
        return Table(run.conditions, rows)


def _in_turn(request: Request, run: "_Comparison") -> Iterator[Row | str]:
    """Yield each method's row or its error; print progress on stderr."""
    work = list(product(request.ratios, request.samples, request.methods))
    started, made = time.perf_counter(), 0
    with tqdm(work, desc="compare", unit="method", file=sys.stderr, disable=None) as bar:
        for count, (ratio, samples, method) in enumerate(bar, 1):
            title = f"{ratio:g} {method}" + (f", {samples} rows" if len(request.samples) > 1 else "")
            bar.set_postfix_str(title)
            try:
                row, reused = run.method(ratio, samples, method)
            except NumpruneError as error:
                yield f"{title}: {error}"
                outcome, made = "failed", made + 1
            else:
                yield row
                made += not reused
                outcome = f"+{row.nll_increase:.4f} {run.conditions.unit}" + ("" if not reused else ", reused")
            left = (time.perf_counter() - started) / max(made, 1) * (len(work) - count)
            eta = f", about {left / 60:.0f} min left" if made and count < len(work) else ""
            tqdm.write(f"[{count}/{len(work)}] {title}: {outcome}{eta}", file=sys.stderr)


class _Comparison:
    """The stages of one comparison."""

    def __init__(self, request: Request) -> None:
        self._request, heldout = request, request.heldout
        self._model = Artifact(request.model, folder_digest(request.model))
        self._text = self._make(
            Stage.of(
                "text",
                "studies",
                steps.make_text,
                model=self._model,
                text=Text(request.text, text_digest(request.text, "train")),
                heldout=Text(heldout, text_digest(heldout, "heldout")) if heldout else None,
                samples=sorted(request.samples),
                sequence_length=request.sequence_length,
                seed=request.seed,
                reading=request.reading,
            )
        )
        # Rows are identified by their own digests, so drawing rows of more sizes keeps the results of the others valid.
        self._heldout = Artifact(self._text.path, self._text.facts.heldout.digest)
        self._reference = self._make(
            Stage.of(
                "reference",
                "studies",
                steps.make_reference,
                model=self._model,
                heldout=self._heldout,
                device=request.device,
            )
        )

    def method(self, ratio: float, samples: int, method: str) -> tuple[Row, bool]:
        """Return one method's row, and whether it was reused."""
        request = self._request
        moments = self._moments(samples) if reads_dense_moments(method) else None
        gradients = self._gradients(samples, method) if reads_gradients(method) else None
        stage = Stage.of(
            "method",
            "studies",
            steps.make_method,
            model=self._model,
            rows=self._rows(samples),
            heldout=self._heldout,
            reference=self._reference.artifact,
            moments=stages.place_of(request.out, moments) if moments else None,
            gradients=stages.place_of(request.out, gradients) if gradients else None,
            method=method,
            ratio=ratio,
            samples=samples,
            align=request.align,
            axes=list(request.axes),
            seed=request.seed,
            device=request.device,
        )
        if stages.find(request.out, stage) is None:
            for needed in (moments, gradients):
                if needed is not None:
                    self._make(needed)
        result = self._make(stage)
        return result.facts, result.reused

    @cached_property
    def conditions(self) -> Conditions:
        request, heldout, dense = self._request, self._text.facts.heldout, self._reference.facts
        assert dense.nll_nats_per_token is not None  # of a language model, or of labelled images
        anatomy = read_anatomy(read_config(request.model))
        return Conditions(
            model=request.name,
            model_digest=self._model.digest,
            sequence_length=anatomy.context if anatomy.image else request.sequence_length,
            align=request.align,
            axes=request.axes,
            seed=request.seed,
            device=request.device,
            calibration={samples: self._rows(samples).digest for samples in sorted(request.samples)},
            heldout_digest=heldout.digest,
            heldout_tokens=heldout.tokens,
            heldout_documents=heldout.documents,
            dense_nll=dense.nll_nats_per_token,
            dense_perplexity=None if anatomy.image else dense.perplexity,
            dense_accuracy=dense.accuracy,
            unit=load_task(request.model).unit,
            dense_parameters=budget_of(anatomy).parameters,
            version=metadata.version("numprune"),
        )

    def _rows(self, samples: int) -> Artifact:
        return Artifact(self._text.path, self._text.facts.calibration[samples].digest)

    def _moments(self, samples: int) -> Stage[SharedPass]:
        return Stage.of(
            "moments",
            "studies",
            steps.make_moments,
            model=self._model,
            rows=self._rows(samples),
            samples=samples,
            device=self._request.device,
        )

    def _gradients(self, samples: int, method: str) -> Stage[SharedPass]:
        return Stage.of(
            "gradients",
            "studies",
            steps.make_gradients,
            model=self._model,
            rows=self._rows(samples),
            samples=samples,
            device=self._request.device,
            taylor=method.startswith("taylor/"),
        )

    def _make(self, stage: Stage[R]) -> StageResult[R]:
        return children.call(stages.run_stage, self._request.out, stage)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Lock `folder` for this process; the kernel releases the lock however the process ends."""
    try:
        with locks.held(folder / ".lock", timeout_s=0):
            yield
    except locks.Held:
        raise InputError(f"another comparison is running in {folder}; wait for it, or give another --out") from None


def _write(path: Path, text: str) -> None:
    """Replace the file by `text` atomically."""
    beside = path.with_name(f".{path.name}.part")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
