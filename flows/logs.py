"""numprune's log lines: human-readable, or one JSON object per line, each with its run and stage.

Only numprune's loggers are configured; those of libraries, Prefect included, are left to the user's logging
configuration.
"""

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TextIO, cast, get_args

from numprune import launcher
from numprune.errors import InputError

Format = Literal["human", "json"]
FORMATS: tuple[str, ...] = get_args(Format)
VARIABLE = "NUMPRUNE_LOG_FORMAT"

_ours = logging.getLogger("numprune")


@dataclass(frozen=True)
class Place:
    """The context of a line: the run's id and the stage's name, if any."""

    run: str | None = None
    stage: str | None = None


_place: ContextVar[Place] = ContextVar("numprune_place", default=Place())  # noqa: B039 (it is frozen)


@dataclass(frozen=True)
class Settings:
    """What a child process needs to log like this one; picklable."""

    format: Format
    level: int
    place: Place
    files: tuple[Path, ...]


class Lines(logging.Formatter):
    """JSON, one object per line: time (UTC, ISO 8601), level, logger, message, run, stage, an exception's traceback."""

    def format(self, record: logging.LogRecord) -> str:
        place = _place.get()
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "run": place.run,
            "stage": place.stage,
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def chosen(asked: str | None) -> Format:
    """The requested format, else that of the environment, else human-readable. Raises InputError if it is unknown."""
    word = asked or os.environ.get(VARIABLE) or "human"
    if word not in FORMATS:
        raise InputError(f"{VARIABLE} is {word!r}; it must be one of {', '.join(FORMATS)}")
    return cast(Format, word)


@contextmanager
def to_stream(form: Format, stream: TextIO | None = None) -> Iterator[None]:
    """Send our lines from INFO up to `stream` (standard error by default), and otherwise only to files.

    Of several processes of a launcher, the first one logs; the others only report errors.
    """
    handler = _handler(form, stream or sys.stderr)
    before = _ours.level, _ours.propagate
    _ours.addHandler(handler)
    _ours.setLevel(logging.ERROR if launcher.index() else logging.INFO)
    _ours.propagate = False
    try:
        yield
    finally:
        _ours.removeHandler(handler)
        _ours.level, _ours.propagate = before


@contextmanager
def to_file(path: Path) -> Iterator[None]:
    """Also append this run's lines to a file as JSON; children write to it, too."""
    handler, run = _file_handler(path), _place.get().run
    handler.addFilter(lambda _record: _place.get().run == run)
    with informing():
        _ours.addHandler(handler)
        try:
            yield
        finally:
            _ours.removeHandler(handler)
            with suppress(OSError):  # as in `_lost`
                handler.close()


@contextmanager
def informing() -> Iterator[None]:
    """Log from INFO up within the body unless a level is set, because a worker's default shows only warnings."""
    before = _ours.level
    if before == logging.NOTSET:
        _ours.setLevel(logging.INFO)
    try:
        yield
    finally:
        _ours.setLevel(before)


@contextmanager
def within(**changes: str) -> Iterator[None]:
    """Set the `run` or `stage` of lines logged in the body."""
    token = _place.set(replace(_place.get(), **changes))
    try:
        yield
    finally:
        _place.reset(token)


def place() -> Place:
    """The current context of lines."""
    return _place.get()


def settings() -> Settings:
    """The current logging settings of this process; of the files, those that get the lines of this thread's run."""
    handlers, line = _ours.handlers, logging.makeLogRecord({})
    written = [handler for handler in handlers if isinstance(handler, logging.FileHandler) and handler.filter(line)]
    files = tuple(Path(handler.baseFilename) for handler in written)
    streams = [handler for handler in handlers if not isinstance(handler, logging.FileHandler)]
    in_json = any(isinstance(handler.formatter, Lines) for handler in streams)
    return Settings("json" if in_json else "human", _ours.getEffectiveLevel(), _place.get(), files)


def adopt(found: Settings) -> None:
    """Log like the parent, in a child process. Warnings of libraries are included."""
    logging.basicConfig(handlers=[_handler(found.format, sys.stderr)])
    _ours.setLevel(found.level)
    _place.set(found.place)
    for path in found.files:
        _ours.addHandler(_file_handler(path))


def complain(form: Format, message: str) -> None:
    """Print the error line of a failed command on standard error."""
    with to_stream(form):
        logging.getLogger("numprune").error(message if form == "json" else f"numprune: {message}")


def _handler(form: Format, stream: TextIO) -> logging.Handler:
    handler = logging.StreamHandler(stream)
    handler.setFormatter(Lines() if form == "json" else logging.Formatter("%(message)s"))
    return handler


def _file_handler(path: Path) -> logging.FileHandler:
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(Lines())
    handler.handleError = _lost  # type: ignore[assignment]
    return handler


def _lost(_record: logging.LogRecord) -> None:
    """Print a line that a full disk rejects on standard error, where logging would print a traceback."""
