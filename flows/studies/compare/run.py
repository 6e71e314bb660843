"""Runs a comparison: everything that methods share once, each method in a process of its own, what is there not again.

A process of its own gives each method a peak of memory that is its own. What is shared goes through files: token rows,
the dense model's moments and gradients (read block by block), and its last hidden states on the held-out rows. Methods
that walk the pruned prefix run the dense model beside it: its outputs of all blocks would be more to read than to
compute again.

Every one of these and every finished method is a stage (see flows/stages.py), so a run that was killed goes on where it
stopped, and nothing made from other weights, text, options or code is taken for what was asked for.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import Any

from tqdm import tqdm

from numprune.anatomy import read_anatomy
from numprune.budget import budget_of
from numprune.documents import Reading
from numprune.errors import InputError, NumpruneError
from numprune.export import locks
from numprune.export.checkpoint import read_config
from numprune.export.manifest import folder_digest, sha256_file
from numprune.flows import children, stages
from numprune.flows.stages import StageResult
from numprune.flows.steps.text import text_digest
from numprune.flows.studies.compare.methods import reads_dense_moments, reads_gradients
from numprune.flows.studies.compare.plot import as_svg
from numprune.flows.studies.compare.table import Conditions, Row, Table, as_csv, as_markdown

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
        name: what it is called in the table.
        text: calibration text: files, or the embedded one.
        reading: how both texts become rows.
        heldout: files, the embedded one, or None: the last fifth of the calibration text, which is then not drawn from.
        ratios, methods, samples: a row for each of their combinations.
        out: folder of the results, and of what they are made of.
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
    seed: int
    device: str
    out: Path


def compare(request: Request) -> Table:
    """Return the table; it stands in `request.out` as CSV, Markdown and SVG, and is written anew after each method.

    Raises:
        InputError: text, model or options that cannot be used; another comparison is at work in `request.out`.
        NumpruneError: methods that failed, named, after all others were run and written.
    """
    _check_text(request)
    with _alone(request.out):
        stages.sweep(request.out)
        run = _Run(request)
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
            raise NumpruneError("\n".join(["these failed; the others are in the table:", *failed]))
        return Table(run.conditions, rows)


def _in_turn(request: Request, run: "_Run") -> Iterator[Row | str]:
    """Yield each method's row, or what was wrong with it; say on stderr how far it is."""
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
                outcome = f"+{row.nll_increase:.4f} nats/token" + ("" if not reused else ", was there")
            left = (time.perf_counter() - started) / max(made, 1) * (len(work) - count)
            eta = f", about {left / 60:.0f} min left" if made and count < len(work) else ""
            tqdm.write(f"[{count}/{len(work)}] {title}: {outcome}{eta}", file=sys.stderr)


class _Run:
    """The stages of one comparison."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._model = {"model": folder_digest(request.model)}
        heldout = request.heldout if request.heldout is not None else request.text
        digests = {
            "text": text_digest(request.text, "train"),
            "heldout": text_digest(heldout, "heldout"),
        }
        options = {
            "samples": sorted(request.samples),
            "sequence_length": request.sequence_length,
            "seed": request.seed,
            "reading": asdict(request.reading),
        }
        own = {"model": request.model, "text": request.text, "heldout": request.heldout}
        split = {"split": request.heldout is None}
        self._text = self._stage("text", "make_text", {**self._model, **digests}, own, options, key=split)
        self._heldout = self._text.facts["heldout"]["digest"]
        self._judged = {**self._model, "heldout": self._heldout}
        self._where = {"model": request.model, "text": self._text.path}
        self._reference = self._stage(
            "reference",
            "make_reference",
            self._judged,
            {**self._where, "heldout": self._heldout},
            {"device": request.device},
        )

    def method(self, ratio: float, samples: int, method: str) -> tuple[Row, bool]:
        """One method's row, and whether it was there already."""
        request = self._request
        options = {
            "method": method,
            "ratio": ratio,
            "samples": samples,
            "align": request.align,
            "seed": request.seed,
            "device": request.device,
        }

        def make(folder: Path) -> dict[str, Any]:
            moments = self._moments(samples) if reads_dense_moments(method) else None
            gradients = self._gradients(samples, method) if reads_gradients(method) else None
            found: dict[str, Any] = children.step(
                "studies.compare.steps.make_method",
                folder,
                **self._where,
                heldout=self._heldout,
                reference=self._reference.path,
                moments=moments and moments.path,
                gradients=gradients and gradients.path,
                shared=[stage.facts for stage in (moments, gradients) if stage],
                **options,
            )
            return found

        inputs = {**self._judged, "calibration": self._calibration(samples)}
        result = stages.run_stage(request.out, "method", inputs, options, make, "studies")
        facts = {key: value for key, value in result.facts.items() if key in Row.__annotations__}
        return Row(ratio=ratio, samples=samples, method=method, **facts), result.reused

    @cached_property
    def conditions(self) -> Conditions:
        request, facts = self._request, self._text.facts["heldout"]
        dense = self._reference.facts
        return Conditions(
            model=request.name,
            model_digest=self._model["model"],
            sequence_length=request.sequence_length,
            align=request.align,
            seed=request.seed,
            device=request.device,
            calibration={samples: self._calibration(samples) for samples in sorted(request.samples)},
            heldout_digest=self._heldout,
            heldout_tokens=facts["tokens"],
            heldout_documents=facts["documents"],
            dense_nll_nats_per_token=dense["nll_nats_per_token"],
            dense_perplexity=dense["perplexity"],
            dense_parameters=budget_of(read_anatomy(read_config(request.model))).parameters,
            version=metadata.version("numprune"),
        )

    def _calibration(self, samples: int) -> str:
        digest: str = self._text.facts["calibration"][str(samples)]["digest"]
        return digest

    def _moments(self, samples: int) -> StageResult:
        return self._shared("moments", samples, {})

    def _gradients(self, samples: int, method: str) -> StageResult:
        return self._shared("gradients", samples, {"taylor": method.startswith("taylor/")})

    def _shared(self, name: str, samples: int, options: Mapping[str, Any]) -> StageResult:
        inputs = {**self._model, "calibration": self._calibration(samples)}
        options = {"device": self._request.device, **options}
        return self._stage(name, f"make_{name}", inputs, {**self._where, "samples": samples}, options)

    def _stage(
        self,
        name: str,
        body: str,
        inputs: Mapping[str, str],
        sources: Mapping[str, Any],
        options: Mapping[str, Any],
        *,
        key: Mapping[str, Any] | None = None,
    ) -> StageResult:
        """A stage made in a child; `key` is what its sources mean beyond the digests of their content."""
        make = partial(children.step, f"studies.compare.steps.{body}", **sources, **options)
        return stages.run_stage(self._request.out, name, inputs, {**options, **(key or {})}, make, "studies")


def _check_text(request: Request) -> None:
    """Refuse a held-out text that is calibrated on. Raises InputError."""
    calibration, heldout = (
        [file for file in text if Path(file).is_file()] if isinstance(text, list) else []
        for text in (request.text, request.heldout)
    )
    calibrated_on = {sha256_file(Path(file)): file for file in calibration}
    for file in heldout:
        if same := calibrated_on.get(sha256_file(Path(file))):
            raise InputError(f"--heldout {file} is the same text as --text {same}; nothing would be held out")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process; the kernel lets it go when the process ends, however it ends."""
    try:
        with locks.held(folder / ".lock", timeout_s=0):
            yield
    except locks.Held:
        raise InputError(f"another comparison is at work in {folder}; wait for it, or give another --out") from None


def _write(path: Path, text: str) -> None:
    """Put `text` in place of the file at once, or not at all."""
    beside = path.with_name(f".{path.name}.part")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
