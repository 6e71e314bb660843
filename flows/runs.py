"""Records of runs in a workspace.

    <workspace>/runs/<run>/
        record.json  the run and its outcome: present from the start, replaced atomically after each stage
        lock         held (flock) by the run's process as long as it lives
        uses/        an empty file for each stage and release that the run wrote or read
        log.jsonl    its log, one JSON object per line

A record without an outcome whose lock is free belongs to an interrupted run.
"""

import logging
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from numprune.counted import counted
from numprune.errors import InputError, IntegrityError
from numprune.export import locks, temporary
from numprune.flows import logs
from numprune.serving.problems import problems

if TYPE_CHECKING:
    from numprune.flows.recipe import Recipe
    from numprune.flows.stages import StageResult

logger = logging.getLogger(__name__)

FOLDER = "runs"  # in the workspace
LOG = "log.jsonl"
MAXIMUM_BYTES = 4 << 20  # of a record, checked before it is parsed
_RECORD, _LOCK, _USES = "record.json", "lock", "uses"
_ID = re.compile(r"\d{8}T\d{6}Z-[0-9a-f]{8}", re.ASCII)
_LOG_TAIL_BYTES = 1 << 20

Outcome = Literal["pass", "fail", "inconclusive", "invalid environment", "error", "interrupted"]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Bytes = Annotated[int, Field(ge=0)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class StageRecord(_Model):
    """One stage of a run: `folder` is its name in the workspace's `stages`, `bytes` the size of its files.

    `seconds` is the time that the run waited for it, `peak_memory_bytes` the peak resident size of the process that
    computed it or, if reused, verified it.
    """

    name: str
    folder: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*-[0-9a-f]{16}$")]
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    reused: bool
    seconds: Seconds
    peak_memory_bytes: Bytes
    bytes: Bytes


class Record(_Model):
    """The record of a run. Paths are relative to the workspace, which may move.

    Attributes:
        run: its id; ids sort by start time.
        recipe: the digest of the recipe with all defaults filled in; `source`: the file.
        outcome: the verdict, or how else the run ended; None until then.
        report: the folder with report.json and report.md.
        release, version: where it was published, if at all.
    """

    schema_: Literal["numprune/run/1"] = Field(default="numprune/run/1", alias="schema")
    run: Annotated[str, Field(pattern=_ID.pattern)]
    name: str
    recipe: str
    source: str
    numprune: str
    pid: int
    started: datetime
    ended: datetime | None = None
    seconds: Seconds | None = None
    outcome: Outcome | None = None
    error: str | None = None
    stages: tuple[StageRecord, ...] = ()
    report: str | None = None
    release: str | None = None
    version: str | None = None


@dataclass(frozen=True)
class RecordedRun:
    """A run with its state: its outcome, "running", "interrupted", or "damaged" if its record cannot be read."""

    run: str
    folder: Path
    started: datetime
    state: str
    record: Record | None = None
    problem: str | None = None

    @property
    def alive(self) -> bool:
        return self.state == "running"


class Recording:
    """The record of an active run."""

    def __init__(self, workspace: Path, folder: Path, record: Record) -> None:
        self.folder = folder
        self._workspace = workspace
        self._record = record
        self._clock = time.perf_counter()

    @property
    def run(self) -> str:
        return self._record.run

    @property
    def record(self) -> Record:
        return self._record

    def add(self, result: "StageResult[Any]") -> None:
        """Record a stage."""
        stage = StageRecord(
            name=result.name,
            folder=result.path.name,
            digest=result.digest,
            reused=result.reused,
            seconds=round(result.seconds, 3),
            peak_memory_bytes=result.peak_memory_bytes,
            bytes=result.bytes,
        )
        self._change(stages=(*self._record.stages, stage))

    def judged(self, outcome: str, report: Path, release: Path | None, version: str | None) -> None:
        """Record the outcome, which is written when the run ends."""
        places = {"report": report, **({"release": release} if release else {})}
        self._record = self._record.model_copy(
            update={
                "outcome": outcome,
                "version": version,
                **{name: path.relative_to(self._workspace).as_posix() for name, path in places.items()},
            }
        )

    def end(self, outcome: Outcome | None = None, error: str | None = None) -> None:
        """Write the final record. A full disk does not change the outcome of the run."""
        seconds = round(time.perf_counter() - self._clock, 3)
        changes: dict[str, Any] = {"ended": datetime.now(UTC), "seconds": seconds}
        if outcome is not None:
            changes |= {"outcome": outcome, "error": error}
        try:
            self._change(**changes)
        except OSError as problem:
            logger.error("the run's record could not be completed (%s); it will be listed as interrupted", problem)

    def _change(self, **changes: Any) -> None:
        self._record = self._record.model_copy(update=changes)
        _write(self.folder, self._record)


@contextmanager
def recording(workspace: Path, recipe: "Recipe", source: Path) -> Iterator[Recording]:
    """Record a run within the context: its lines go to its log, and the record states how the body ended."""
    with _started(workspace, recipe, source) as found, logs.within(run=found.run), logs.to_file(found.folder / LOG):
        try:
            yield found
        except Exception as error:
            found.end("error", _plain(str(error) or type(error).__name__))
            raise
        except BaseException:
            found.end("interrupted")
            raise
        found.end()


def mark(run_folder: Path | None, used: Path) -> None:
    """Mark a stage or release as used by a run, so that `clean` keeps it. Call it while holding the lock of `used`."""
    if run_folder is not None:
        (run_folder / _USES / used.parent.name / used.name).touch()


def is_used(workspace: Path, folder: Path) -> bool:
    """Whether any recorded run uses a stage or release."""
    return any((path / _USES / folder.parent.name / folder.name).exists() for path in _folders(workspace))


def uses(run: RecordedRun) -> set[tuple[str, str]]:
    """("stages" or "releases", name) for everything that the run uses."""
    found = (run.folder / _USES).glob("*/*")
    return {(path.parent.name, path.name) for path in found}


def list_runs(workspace: Path) -> list[RecordedRun]:
    """All recorded runs, newest first."""
    return [run for folder in reversed(_folders(workspace)) if (run := _look(folder)) is not None]


def find(workspace: Path, asked: str | None) -> RecordedRun:
    """The run with this id or prefix; by default the newest. Raises InputError."""
    runs = list_runs(workspace)
    found = [run for run in runs if run.run.startswith(asked or "")]
    if not found:
        raise InputError(
            f"run {asked!r}: not found among the {counted(len(runs), 'run')} in {workspace}"
            if asked
            else f"{workspace}: no run was recorded here"
        )
    if asked and len(found) > 1:
        raise InputError(
            f"run {asked!r}: ambiguous, {len(found)} runs begin with it: {', '.join(run.run for run in found)}"
        )
    return found[0]


def log_tail(run: RecordedRun, lines: int) -> list[str]:
    """The last lines of a run's log."""
    try:
        handle = os.open(run.folder / LOG, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return []
    with os.fdopen(handle, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _LOG_TAIL_BYTES))
        return file.read(_LOG_TAIL_BYTES).decode(errors="replace").splitlines()[-lines:]


def read(folder: Path) -> Record:
    """The record in a run's folder. Raises IntegrityError."""
    path = folder / _RECORD
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(handle, "rb") as file:
            raw = file.read(MAXIMUM_BYTES + 1)
        if len(raw) > MAXIMUM_BYTES:
            raise IntegrityError(f"{path}: exceeds the {MAXIMUM_BYTES:,}-byte limit")
        record = Record.model_validate_json(raw)
    except OSError as error:
        raise IntegrityError(f"{path}: cannot be read: {error.strerror}") from None
    except ValidationError as error:
        raise IntegrityError(f"{path}: {problems(error)}") from None
    if record.run != folder.name:
        raise IntegrityError(f"{path}: belongs to run {record.run}")
    return record


@contextmanager
def only_if_over(run: RecordedRun) -> Iterator[bool]:
    """Hold the lock of a run whose process has ended; False, without the lock, if it is alive."""
    lock = run.folder / _LOCK
    try:
        handle = locks.open_file(lock, create=False)
    except FileNotFoundError:  # damaged, or just removed
        yield run.folder.is_dir()
        return
    try:
        locks.acquire(handle, lock, wait=False)
    except locks.Held:
        os.close(handle)
        yield False
        return
    try:
        yield True
    finally:
        os.close(handle)


# --- details --------------------------------------------------------------------------------------


@contextmanager
def _started(workspace: Path, recipe: "Recipe", source: Path) -> Iterator[Recording]:
    """Create a run's folder atomically: locked, with a record that it has started."""
    now = datetime.now(UTC)
    run = f"{now:%Y%m%dT%H%M%SZ}-{secrets.token_hex(4)}"
    record = Record(
        run=run,
        name=recipe.registry.name,
        recipe=recipe.digest,
        source=_plain(str(source)),
        numprune=metadata.version("numprune"),
        pid=os.getpid(),
        started=now,
    )
    folder = workspace / FOLDER / run
    with temporary.beside(folder) as content:
        for kind in ("stages", "releases"):
            (content / _USES / kind).mkdir(parents=True)
        handle = locks.open_file(content / _LOCK)
        try:
            locks.acquire(handle, content / _LOCK)
            _write(content, record)
            temporary.move(content, folder)
        except BaseException:
            os.close(handle)
            raise
    try:
        yield Recording(workspace, folder, record)
    finally:
        os.close(handle)


def _write(folder: Path, record: Record) -> None:
    partial = folder / f".{_RECORD}.partial"  # one process writes
    with partial.open("w", encoding="utf-8") as file:
        file.write(record.model_dump_json(indent=1, by_alias=True) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / _RECORD)


def _plain(text: str) -> str:
    """Remove what is not text: file names may contain any bytes."""
    return text.encode(errors="backslashreplace").decode()


def _folders(workspace: Path) -> list[Path]:
    """The folders of all runs, oldest first."""
    parent = workspace / FOLDER
    named = [path for path in parent.iterdir() if _start_of(path.name) is not None] if parent.is_dir() else []
    return [path for path in sorted(named) if path.is_dir() and not path.is_symlink()]


def _start_of(run: str) -> datetime | None:
    """When a run started, from its id; None if it is not an id."""
    try:
        return datetime.strptime(run[:16], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC) if _ID.fullmatch(run) else None
    except ValueError:
        return None


def _look(folder: Path) -> RecordedRun | None:
    """Read a run; None if just removed. Liveness is checked first, so that an outcome written meanwhile is seen."""
    alive, started = _is_alive(folder), _start_of(folder.name)
    assert started is not None  # _folders
    try:
        record = read(folder)
    except IntegrityError as error:
        state = "running" if alive else "damaged"
        return RecordedRun(folder.name, folder, started, state, problem=str(error)) if folder.is_dir() else None
    state = record.outcome or ("running" if alive else "interrupted")
    return RecordedRun(folder.name, folder, started, state, record)


def _is_alive(folder: Path) -> bool:
    try:
        return not locks.is_free(folder / _LOCK)
    except OSError:
        return False
