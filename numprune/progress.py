"""Progress of a long loop: a bar on a terminal, otherwise a log line every 30 seconds."""

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, TypeVar

from tqdm import tqdm

from numprune import launcher
from numprune.counted import counted

T = TypeVar("T")

logger = logging.getLogger(__name__)

_EVERY_S = 30.0

# tqdm's default lock is a system semaphore, which Python reports as leaked if Ctrl-C ends a child. It is not needed:
# two processes never draw on one terminal here.
tqdm.set_lock(threading.RLock())


class Progress:
    """`with Progress(total, "calibrate", "layer") as bar: … bar.update()`."""

    def __init__(self, total: int | None, title: str, unit: str, *, leave: bool = False, done: int = 0) -> None:
        """
        Args:
            total: None: unknown.
            unit: what is counted, in the singular.
            leave: keep the bar on the terminal after the loop.
            done: number done by an earlier process.
        """
        silent = True if launcher.index() else None  # the first process shows the progress; None: on a terminal only
        self._bar: tqdm[Any] = tqdm(total=total, desc=title, unit=unit, leave=leave, initial=done, disable=silent)
        self._total, self._title, self._unit = total, title, unit
        self._done = self._before = done
        self._started = self._told = time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def update(self, count: int = 1, note: str = "") -> None:
        """Advance by `count`; `note` is shown beside the bar."""
        if note:
            self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(count)
        self._done += count
        now = time.monotonic()
        if not self._bar.disable or now - self._told < _EVERY_S or self._done == self._total:
            return
        self._told = now
        if self._total is None:
            logger.info("%s: %s%s", self._title, counted(self._done, self._unit), f", {note}" if note else "")
            return
        left = (now - self._started) / (self._done - self._before) * (self._total - self._done)
        logger.info(
            "%s: %d of %d %ss, %sabout %s left",
            self._title,
            self._done,
            self._total,
            self._unit,
            f"{note}, " if note else "",
            _duration(left),
        )


def progress(items: Sequence[T], title: str, unit: str) -> Iterator[T]:
    """Yield the items and show the progress."""
    with Progress(len(items), title, unit) as bar:
        for item in items:
            yield item
            bar.update()


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
