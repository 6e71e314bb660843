"""What a sweep found: sweep.json, sweep.md and sweep.html."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from numprune.counted import counted
from numprune.flows import runs
from numprune.flows.names import Objective
from numprune.flows.sweep.grid import Candidate, shown
from numprune.serving import front
from numprune.serving import report as reports
from numprune.serving.front import Point
from numprune.serving.report import UNITS, Outcome, words
from numprune.serving.report.markdown_cells import cell, table
from numprune.serving.report.page import sweep as pages

SCHEMA = "numprune/sweep/1"
JSON, TEXT, PAGE = "sweep.json", "sweep.md", "sweep.html"


@dataclass(frozen=True)
class Explored:
    """How the run of a candidate ended.

    Attributes:
        outcome: its verdict, or "error"; "invalid environment", too, if blocks could not be timed.
        error: what stopped it.
        headline: the first sentence of its report.
        run: its id; None if an error stopped it before its first stage.
        report, page: its report.json and report.html; None after an error.
    """

    outcome: Outcome | Literal["error"]
    error: str | None = None
    headline: str | None = None
    run: str | None = None
    report: str | None = None
    page: str | None = None


@dataclass(frozen=True)
class Result:
    """A candidate; `explored` is None until its run has ended, `point` if its figures do not count."""

    number: int
    label: str
    settings: Mapping[str, Any]
    explored: Explored | None = None
    point: Point | None = None
    on_front: bool = False

    @property
    def outcome(self) -> str:
        return self.explored.outcome if self.explored else "pending"

    @property
    def why(self) -> str:
        """Its error in one line, or why it does not pass."""
        if self.explored is None or self.outcome == "pass":
            return ""
        return " ".join((self.explored.error or self.explored.headline or "").split())


@dataclass(frozen=True)
class Sweep:
    """A sweep, finished or not.

    Attributes:
        folder: of sweep.json, sweep.md and sweep.html.
        recipe: the file; `name`: of the registered model.
        speed: the metric of `point.speed`; `axes`: the names of the three figures.
        choose: what is published, if anything.
        candidates: in the order of the grid.
        outcome: of the chosen candidate; if none was chosen, the most hopeful outcome of the others. None without
            `choose`, before the choice, or if all candidates have errors.
        chosen: its number; None if none passes.
        published: the summary of the run that published it.
    """

    folder: Path
    recipe: str
    name: str
    speed: str
    axes: pages.Axes
    choose: Objective | None
    candidates: tuple[Result, ...]
    outcome: Outcome | None = None
    chosen: int | None = None
    published: Mapping[str, Any] | None = None

    @staticmethod
    def of(folder: Path, source: Path, candidates: Sequence[Candidate], task: str, choose: Objective | None) -> "Sweep":
        """A sweep of which no candidate has run yet; `task`: of the model."""
        name, benchmark = candidates[0].recipe.registry.name, candidates[0].recipe.benchmark
        speed = front.speed_metric(benchmark.runtimes, task)
        axes = words.metric(front.LOSS, UNITS[task]), words.metric(speed), words.metric(front.BYTES)  # type: ignore[index]
        results = tuple(Result(one.number, one.label, one.settings) for one in candidates)
        return Sweep(folder, str(source), name, speed, axes, choose, results)

    @property
    def page(self) -> Path:
        return self.folder / PAGE

    @property
    def errors(self) -> int:
        return sum(candidate.outcome == "error" for candidate in self.candidates)

    def with_result(self, number: int, explored: Explored) -> "Sweep":
        """This sweep after the run of a candidate has ended."""
        point = front.point(reports.read(Path(explored.report)), self.speed) if explored.report else None
        found = [
            replace(one, explored=explored, point=point) if one.number == number else one for one in self.candidates
        ]
        fronts = front.on_front([one.point for one in found])
        return replace(self, candidates=tuple(replace(one, on_front=on) for one, on in zip(found, fronts, strict=True)))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "schema": SCHEMA,
            "recipe": self.recipe,
            "name": self.name,
            "metrics": {"loss": front.LOSS, "speed": self.speed, "bytes": front.BYTES},
            "choose": self.choose,
            "outcome": self.outcome,
            "chosen": self.chosen,
            "release": self.published["release"] if self.published else None,
            "version": self.published["version"] if self.published else None,
            "candidates": [
                {
                    "number": one.number,
                    "settings": dict(one.settings),
                    "outcome": one.outcome,
                    "error": one.explored and one.explored.error,
                    "headline": one.explored and one.explored.headline,
                    "run": one.explored and one.explored.run,
                    "report": one.explored and one.explored.report,
                    "on_front": one.on_front,
                    "figures": asdict(one.point) if one.point else None,
                }
                for one in self.candidates
            ],
            "page": str(self.page),
        }

    def write(self) -> None:
        """Write all three files, each atomically."""
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n"
        reports.replace(self.folder / JSON, text)
        reports.replace(self.folder / TEXT, self.markdown())
        reports.replace(self.page, self.html())

    def headline(self) -> str:
        """What was found, in one sentence."""
        done = sum(one.explored is not None for one in self.candidates)
        of = counted(len(self.candidates), "candidate")
        parts = [of if done == len(self.candidates) else f"{done} of {of} done"]
        parts.append(f"{sum(one.on_front for one in self.candidates)} on the Pareto front")
        if self.errors:
            parts.append(counted(self.errors, "error"))
        if self.outcome is not None:
            parts.append(self._choice())
        return f"{', '.join(parts)}."

    def markdown(self) -> str:
        """The table of candidates."""
        header = ["", "settings", *self.axes, "verdict", "on the front"]
        rows = [
            [str(one.number), one.label, *_cells(one), one.outcome, "yes" if one.on_front else ""]
            for one in self.candidates
        ]
        lines = [f"# Sweep of {cell(self.name)}", "", cell(self.headline()), "", *table(header, rows), pages.RULE]
        return "\n".join(lines) + "\n"

    def html(self) -> str:
        """The page."""
        rows = [
            pages.Row(
                number=one.number,
                label=", ".join(f"{key} = {shown(value)}" for key, value in one.settings.items()),
                outcome=one.outcome,
                note=one.why,
                link=self._link(one),
                point=one.point,
                on_front=one.on_front,
                chosen=one.number == self.chosen,
            )
            for one in self.candidates
        ]
        return pages.html(self.name, self.headline(), self.outcome or "not judged", self.axes, rows)

    def text(self) -> str:
        """The same for a terminal."""
        return "\n".join([self.headline(), "", *self._lines(), "", f"  page      {self.page}", *self._published()])

    def _lines(self) -> Iterator[str]:
        widest = max(len(one.label) for one in self.candidates)
        for one in self.candidates:
            mark = "*" if one.on_front else " "
            told = "  ".join(_cells(one)) if one.point else one.why
            yield f"{mark} {one.number:>2}  {one.label:<{widest}}  {one.outcome:<12}  {told}".rstrip()
        yield f"  * on the Pareto front; {'; '.join(self.axes)}"

    def _published(self) -> Iterator[str]:
        if self.published and self.published["release"]:
            yield f"  release   {self.published['release']}"
            yield f"  published {self.published['version']} as candidate"
            for index, command in enumerate(self.published["next"]):
                yield f"  {'' if index else 'next':<9} {command}"

    def _link(self, one: Result) -> str:
        """A link to a candidate's report or, without one, to the log of its run; the workspace may move as a whole."""
        if one.explored is None or one.explored.run is None:
            return ""
        log = self.folder.parents[1] / runs.FOLDER / one.explored.run / runs.LOG
        return Path(os.path.relpath(one.explored.page or log, self.folder)).as_posix()

    def _choice(self) -> str:
        if self.chosen is None:
            return f"none passes its gates ({self.outcome}), nothing was published"
        of = f"the {(self.choose or '').replace('-', ' ')} that passes is {self.chosen}"
        version = self.published["version"] if self.published else None
        return f"{of}: published {version}" if version else f"{of}: {self.outcome}, nothing was published"


def _cells(one: Result) -> list[str]:
    if one.point is None:
        return [words.ABSENT] * 3
    loss, speed, size = one.point.loss, one.point.speed, one.point.bytes
    return [
        f"{words.signed(loss.value)} ({words.span(loss.low, loss.high)})",
        f"{words.times(speed.value)} ({words.span(speed.low, speed.high)})",
        words.times(size.value),
    ]
