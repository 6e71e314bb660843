"""Uses a registry in forked processes, which die at the step where they are told to.

python -m tests.serving.actor      # a JSON object a line on stdin; see `Actors`
"""

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow.tracking  # noqa: F401 - takes seconds, and every process needs it
import sqlalchemy.event
from sqlalchemy.engine import Engine

from numprune.errors import NumpruneError
from numprune.serving import registry as registries

_CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.copyfile")


def act(
    do: str,
    arguments: list[str],
    out: str,
    workspace: str,
    uri: str | None = None,
    environment: dict[str, str] | None = None,
    die_at: int | None = None,
) -> int:
    """Call a function of the registry and write what it returns, or its error, to `out` as JSON.

    Args:
        die_at: the step, counted from 0, before which the process kills itself: see `_count`.
    """
    os.environ.update(environment or {})
    steps: list[str] = []
    try:
        registry = registries.open_registry(uri, Path(workspace))
        _count(steps, die_at)
        first, *rest = arguments
        given = [Path(first), *rest] if do == "publish" else [first, *map(Path, rest)]
        said, code = getattr(registries, do)(registry, *given), 0
    except NumpruneError as error:
        said, code = "".join(traceback.format_exception(error)), 1  # with all that a log would hold
    version = getattr(said, "version", None)
    Path(out).write_text(json.dumps({"version": version, "steps": steps} if version else str(said)))
    return code


def _count(steps: list[str], die_at: int | None) -> None:
    """A step is a change of the disk or of the database, or a commit."""

    def step(what: str) -> None:
        if len(steps) == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        steps.append(what)

    def changed(event: str, details: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(details[2], int) and details[2] & (os.O_WRONLY | os.O_RDWR)
        if event in _CHANGES or writes:
            step(event)

    def executed(*details: Any) -> None:
        if not details[2].lstrip().upper().startswith(("SELECT", "PRAGMA")):
            step(details[2])

    sys.addaudithook(changed)
    sqlalchemy.event.listen(Engine, "before_cursor_execute", executed)
    sqlalchemy.event.listen(Engine, "commit", lambda _: step("COMMIT"))


def _fork(work: Callable[[], int]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def main() -> None:
    for line in sys.stdin:
        task = json.loads(line)
        if "wait" in task:
            answer = os.waitstatus_to_exitcode(os.waitpid(task["wait"], 0)[1])
        else:
            answer = _fork(lambda task=task: act(**task))  # type: ignore[misc]
        print(answer, flush=True)


if __name__ == "__main__":
    main()
