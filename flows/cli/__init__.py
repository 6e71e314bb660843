"""The command line: a thin layer over the other modules, with one file per group of commands.

A command's result goes to stdout, once, at its end; everything else goes to stderr. With `--json` a failure is also an
object on stdout: `error` and `exit_code`. Tensor libraries, Prefect and MLflow are imported only by the commands that
need them, so `numprune --help` is fast.

Exit codes: 0 pass or done, 1 error, 2 gate failed, 3 inconclusive, 4 invalid environment, 130 interrupted.
"""

import argparse
import atexit
import gc
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from io import TextIOWrapper
from types import FrameType
from typing import Any

from numprune import launcher
from numprune.errors import EnvironmentInvalid, InputError, NumpruneError
from numprune.export import disk
from numprune.export.imports import leave_out_sklearn, leave_out_torch
from numprune.flows import children, logs, machine
from numprune.flows.cli import (
    benchmark,
    check_server,
    completion,
    convert,
    kubernetes,
    learn,
    model,
    optimize,
    prune,
    push,
    quantize,
    recover,
    registry,
    report,
    rollout,
    runs,
    serve,
    sweep,
    tasks,
    timings,
)
from numprune.flows.cli.parser import Answer, build, parse
from numprune.serving import loopback

COMMANDS = (
    optimize,
    sweep,
    learn,
    prune,
    recover,
    quantize,
    model,
    convert,
    tasks,
    timings,
    benchmark,
    report,
    registry,
    push,
    serve,
    rollout,
    check_server,
    kubernetes,
    runs,
    completion,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    atexit.register(gc.freeze)  # otherwise exiting takes a second, to free memory needlessly
    children.prepare_threads()
    loopback.exempt()
    machine.open_closed_streams()
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    words = sys.argv[1:] if argv is None else argv
    form: logs.Format = "human"
    in_json = "--json" in words[: words.index("--") if "--" in words else None]  # needed before the rest is parsed
    try:
        form = logs.chosen(None)
        args = parse(build(COMMANDS), words)
        form = logs.chosen(args.log_format)
        _require_shareable(args)
        machine.require_stdout()
        machine.require_current_folder()
        machine.provide_home()
        if argv is None:  # the process is ours alone
            leave_out_sklearn()
            if not args.needs_torch:
                leave_out_torch()
        with logs.to_stream(form), _terminable():
            with _stdout_kept():
                answer: Answer = args.run(args)
            if not answer.quiet:
                _print(_as_json(answer.data) if args.json else answer.text)
            in_json = False  # only one object is printed; failures while serving go to stderr
            return answer.then() if answer.then else answer.exit_code
    except NumpruneError as error:
        code = 4 if isinstance(error, EnvironmentInvalid) else int(getattr(error, "exit_code", 1))
        return _fail(form, str(error), code, in_json)
    except KeyboardInterrupt:
        return _fail(form, "interrupted", 130, in_json)
    except Exception as error:
        refused = disk.refusal(error)
        if refused is None:
            if in_json:
                _print_failure(f"{type(error).__name__}: {error}", 1)
            raise
        return _fail(form, str(refused), 1, in_json)


def _require_shareable(args: argparse.Namespace) -> None:
    """Raises InputError if several processes were started for a command that runs in one."""
    if launcher.count() > 1 and not args.shareable:
        raise InputError(
            f"a launcher started {launcher.count()} processes, and only numprune prune and numprune recover share "
            "their work among several; start this command without torchrun or accelerate launch"
        )


def _fail(form: logs.Format, message: str, code: int, in_json: bool) -> int:
    logs.complain(form, message if code == 130 else f"error: {message}")
    if in_json:
        _print_failure(message, code)
    return code


def _print_failure(message: str, code: int) -> None:
    if sys.stdout is not None and launcher.index() == 0:  # one object, however many processes fail
        _print(_as_json({"error": message, "exit_code": code}))


def _as_json(data: dict[str, Any]) -> str:
    return json.dumps(data, indent=2, allow_nan=False)


@contextmanager
def _stdout_kept() -> Iterator[None]:
    """Redirect output of libraries and child processes to stderr: stdout is for the result."""
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the command like an exception, so that nothing is left running."""

    def end(_signal: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _print(text: str) -> None:
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for ASCII-only terminals
    try:
        print(text, flush=True)
    except BrokenPipeError:  # the reader has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter's final flush would fail


__all__ = ["main"]
