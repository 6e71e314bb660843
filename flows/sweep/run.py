"""Runs the candidates of a sweep, several at a time, and publishes the best of them.

Every candidate is an ordinary recorded run without publication. They share a workspace, so a stage that several need is
made once; a killed sweep continues where it stopped. While a stage measures time on a machine, no other stage of a
sweep works there.
"""

import hashlib
import json
import logging
import platform
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from contextlib import ExitStack, closing, contextmanager
from contextvars import copy_context
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar, get_args

from numprune.errors import EnvironmentInvalid, InputError, NumpruneError
from numprune.export import locks
from numprune.flows import children, execute, logs, recipe, stages
from numprune.flows.children import ChildDied
from numprune.flows.execute import MakeStage
from numprune.flows.names import Objective
from numprune.flows.run import Run, prepare
from numprune.flows.stages import Stage, StageResult
from numprune.flows.sweep import choice
from numprune.flows.sweep import grid as grids
from numprune.flows.sweep.grid import Candidate, Grid
from numprune.flows.sweep.results import Explored, Sweep

logger = logging.getLogger(__name__)

R = TypeVar("R")

FOLDER = "sweeps"  # in the workspace
_LOOKS_UP_S = 0.5  # while it waits for a lock: whether the sweep was interrupted
# Explores all runs and yields each one's index with its result, in the order in which they end.
Ended = Generator[tuple[int, Explored], None, None]
ExploreAll = Callable[[Sequence[Run], Path], Ended]


def sweep(
    source: str | Path | None,
    grid: Grid,
    *,
    overrides: Sequence[str] = (),
    choose: Objective | None = None,
    workspace: str | Path | None = None,
    workers: int = 1,
) -> Sweep:
    """Run every combination of a grid of recipes, and publish the best.

    Args:
        source: a TOML recipe; None: the embedded one.
        grid: "section.key" -> values, like {"prune.ratio": [0.1, 0.2]}.
        overrides: `section.key=value` for all candidates.
        choose: "fastest", "smallest" or "best-quality" of the candidates that pass their gates is published; None:
            nothing is.
        workspace: the folder of stages, runs, sweeps, releases and registry; None: as of `numprune optimize`.
        workers: candidates at a time.

    Returns:
        The candidates, each with its figures and verdict, or its error.

    Raises:
        InputError: an argument, the grid, or a recipe with its values is not valid, or cannot run here; nothing has
            run then.
    """
    if choose is not None and choose not in get_args(Objective):
        raise InputError(f"choose is {choose!r}; it must be one of {', '.join(get_args(Objective))}, or None")
    if workers < 1:
        raise InputError(f"workers is {workers}; it must be at least 1")
    path = recipe.source_of(str(source) if source else None)
    candidates = grids.expand(path, grid, overrides)
    folder = stages.workspace_folder(str(workspace) if workspace else None)
    return execute_sweep(candidates, path, folder, choose, partial(in_threads, workers=workers))


def execute_sweep(
    candidates: Sequence[Candidate],
    source: Path,
    workspace: Path,
    choose: Objective | None,
    explore_all: ExploreAll,
    publish: execute.Publish = execute.publish,
    make: MakeStage = Run.make,
) -> Sweep:
    """As of `sweep`; `explore_all` runs the candidates, `make` and `publish` are of the run that publishes the best."""
    runs = children.call(prepare_all, candidates, workspace)
    found = Sweep.of(_folder(workspace, candidates, choose), source, candidates, runs[0].task, choose)
    found.write()
    with closing(explore_all(runs, source)) as ended:
        for index, explored in ended:
            candidate = candidates[index]
            found = found.with_result(candidate.number, explored)
            found.write()
            told = explored.error or explored.outcome
            logger.info("candidate %d of %d (%s): %s", candidate.number, len(candidates), candidate.label, told)
    if choose is not None:
        found = _publish(found, choose, runs, source, make, publish)
        found.write()
    return found


def prepare_all(candidates: Sequence[Candidate], workspace: Path) -> list[Run]:
    """The runs of all candidates. Raises InputError with the problems of all that cannot run here."""
    made: list[Run] = []
    refused: dict[str, list[str]] = {}
    for candidate in candidates:
        try:
            made.append(replace(prepare(candidate.recipe, workspace), candidates=len(candidates)))
        except InputError as error:
            refused.setdefault(str(error), []).append(candidate.label)
    grids.refuse(refused)
    return made


def explore(run: Run, source: Path, make: MakeStage = Run.make, stopping: threading.Event | None = None) -> Explored:
    """Run a candidate without publishing it. Its failure is a result: the other candidates go on.

    `stopping`: ends waiting for another sweep, with KeyboardInterrupt.
    """
    records = set[Path]()

    def make_here(run: Run, stage: Stage[R]) -> StageResult[R]:
        if run.record is not None:
            records.add(run.record)
        return _undisturbed(make, stopping, run, stage)

    def stopped(outcome: Literal["invalid environment", "error"], why: str) -> Explored:
        return Explored(outcome, why, run=next((record.name for record in records), None))

    try:
        found = execute.execute(_here(run), source, make_here, publish=None)
    except EnvironmentInvalid as error:
        return stopped("invalid environment", str(error))
    except NumpruneError as error:
        return stopped("error", str(error))
    except Exception as error:
        logger.exception("a candidate failed")
        # The last line of a traceback from a stage's process.
        return stopped("error", (str(error).strip() or type(error).__name__).splitlines()[-1])
    return Explored(found["outcome"], None, *(found[key] for key in ("headline", "run", "report", "page")))


def in_threads(
    runs: Sequence[Run],
    source: Path,
    workers: int,
    make: MakeStage = Run.make,
    explore: Callable[[Run, Path, MakeStage, threading.Event], Explored] = explore,
) -> Ended:
    """Explore the runs in threads of this process, `workers` at a time; their stages are processes of their own."""
    stopping = threading.Event()

    def make_unless_stopped(run: Run, stage: Stage[R]) -> StageResult[R]:
        try:
            if stopping.is_set():
                raise KeyboardInterrupt
            return make(run, stage)
        except ChildDied:
            if stopping.is_set():
                raise KeyboardInterrupt from None  # its record says that it was interrupted
            raise

    with logs.informing(), ThreadPoolExecutor(workers) as pool:
        futures: dict[Future[Explored], int] = {}
        try:
            for index, run in enumerate(runs):
                submitted = pool.submit(copy_context().run, explore, run, source, make_unless_stopped, stopping)
                futures[submitted] = index
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)
            while left := [future for future in futures if not future.done()]:  # `wait` never counts cancelled ones
                children.end_all()
                wait(left, timeout=0.1)
            raise


# --- details --------------------------------------------------------------------------------------


def _here(run: Run) -> Run:
    """The run, prepared again if a scheduler has taken it to another machine."""
    if run.machine["node"] == platform.node():
        return run
    return replace(children.call(prepare, run.recipe, run.workspace), candidates=run.candidates)


def _undisturbed(make: MakeStage, stopping: threading.Event | None, run: Run, stage: Stage[R]) -> StageResult[R]:
    """Make a stage. Beside one that measures time no other runs on the machine, and one at a time uses its GPU."""
    with ExitStack() as holding:
        with _this_machine(run.workspace, "turn", stopping):  # later ones do not overtake one that measures time
            holding.enter_context(_this_machine(run.workspace, "time", stopping, shared=not stage.measures_time))
        if run.uses_gpu and stage.uses_gpu:
            holding.enter_context(_this_machine(run.workspace, "gpu", stopping))
        return make(run, stage)


@contextmanager
def _this_machine(
    workspace: Path, what: str, stopping: threading.Event | None, *, shared: bool = False
) -> Iterator[None]:
    """Hold a lock of this machine, which all sweeps of the workspace take.

    Raises KeyboardInterrupt if `stopping` is set before it is free: another process may hold it for a long time.
    """
    lock = workspace / FOLDER / f".{platform.node()}-{what}.lock"
    with ExitStack() as holding:
        while True:
            try:
                holding.enter_context(locks.held(lock, timeout_s=_LOOKS_UP_S, shared=shared))
                break
            except locks.Held:
                if stopping is not None and stopping.is_set():
                    raise KeyboardInterrupt from None
        yield


def _folder(workspace: Path, candidates: Sequence[Candidate], choose: str | None) -> Path:
    key = json.dumps([[candidate.recipe.digest for candidate in candidates], choose])
    name = candidates[0].recipe.registry.name
    return workspace / FOLDER / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def _publish(
    found: Sweep, choose: Objective, runs: Sequence[Run], source: Path, make: MakeStage, publish: execute.Publish
) -> Sweep:
    outcomes = [candidate.outcome for candidate in found.candidates]
    index = choice.best(choose, outcomes, [candidate.point for candidate in found.candidates])
    if index is None:
        return replace(found, outcome=choice.without_one(outcomes))  # None if no candidate was judged
    published = execute.execute(runs[index], source, make, publish)
    return replace(found, chosen=found.candidates[index].number, outcome=published["outcome"], published=published)
