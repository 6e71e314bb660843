"""Runs a function in its own process: its memory is freed at the end, and its death is an ordinary error.

Processes are forked from a server that has only imported the tensor libraries: a child starts in milliseconds instead
of seconds and shares the libraries' memory with the others.
"""

import multiprocessing
import os
import signal
import tempfile
import threading
import traceback
from collections.abc import Callable
from functools import partial
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, ParamSpec, TypeVar

from numprune.errors import NumpruneError
from numprune.export import disk, processors
from numprune.flows import logs

P = ParamSpec("P")
T = TypeVar("T")

_PRELOADED = ["numprune.flows.preloaded"]
_CLOSING_S = 10.0

_context = multiprocessing.get_context("forkserver")
_starting = threading.Lock()  # of the server: starting it changes the environment for a moment
_running: set[BaseProcess] = set()


class ChildDied(NumpruneError):
    """The process was ended by a signal or by native code, not by an exception."""


class ChildFailed(Exception):
    """Unexpected exception in the worker process; the message is its traceback."""


def prepare_threads() -> None:
    """Limit threads to the number of CPUs, and make waiting threads sleep instead of spin; call before importing torch.

    User settings take precedence. On a shared machine, spinning threads keep those they wait for off the CPU: with two
    cores and two other busy programs, pruning took 3.3 times as long.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if quota := processors.quota():
        os.environ.setdefault("OMP_NUM_THREADS", str(quota))


def warm_up() -> None:
    """Start the server now, so that it imports in the background."""
    with _starting:
        _start()


def _start() -> None:
    prepare_threads()
    _context.set_forkserver_preload(_PRELOADED)
    resource_tracker.ensure_running()  # which would unblock SIGINT
    # Ctrl-C reaches the whole process group, but this process ends the children. They inherit the mask.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    tempfile.tempdir, temporary = disk.folder_for_sockets(), tempfile.gettempdir()
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"  # no file in the current folder may shadow a module
    try:
        forkserver.ensure_running()
    finally:
        tempfile.tempdir = temporary
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if before is None:
            del os.environ["PYTHONSAFEPATH"]
        else:
            os.environ["PYTHONSAFEPATH"] = before


def call(function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Return `function(*args, **kwargs)`, computed in a child; all of it must be picklable.

    Imports inside the function happen only in the child.

    The child ends with this process, however that ends, and when the wait is interrupted.

    Raises:
        NumpruneError: raised by the function, or DiskError for a file system error, or ChildDied.
        ChildFailed: the function raised anything else.
    """
    warm_up()
    ours, theirs = _context.Pipe()
    work = partial(function, *args, **kwargs)
    process = _context.Process(target=_run, args=(theirs, logs.settings(), work), daemon=True)
    process.start()
    _running.add(process)
    theirs.close()
    try:
        outcome, value = ours.recv()
    except EOFError:
        process.join()
        name = getattr(function, "__name__", str(function))
        raise ChildDied(f"{name}: its process was ended by {_ending(process.exitcode or 0)}") from None
    finally:
        _running.discard(process)
        ours.close()  # tells the child to end if it is still alive
        process.join(_CLOSING_S)
        if process.is_alive():
            process.kill()
            process.join()
    if outcome == "raised":
        raise value
    if outcome == "crashed":
        raise ChildFailed(value)
    return value


def end_all() -> None:
    """Kill every child. The calls that wait for them, in whichever thread, raise ChildDied."""
    for process in tuple(_running):
        process.kill()


def _run(connection: Connection, logging_as: logs.Settings, function: Callable[[], Any]) -> None:
    os.dup2(2, 1)  # stdout belongs to the parent
    logs.adopt(logging_as)
    answered = threading.Event()
    threading.Thread(target=_end_with, args=(connection, answered), daemon=True).start()
    try:
        answer = "returned", function()
    except BaseException as error:
        told = error if isinstance(error, NumpruneError) else disk.refusal(error)
        answer = ("raised", told) if told else ("crashed", traceback.format_exc())
    answered.set()
    connection.send(answer)


def _end_with(connection: Connection, answered: threading.Event) -> None:
    """End this process once its parent has stopped waiting, which closes `connection`."""
    try:
        connection.recv()
    except (EOFError, OSError):
        if not answered.is_set():
            os._exit(1)


def _ending(exit_code: int) -> str:
    if exit_code >= 0:
        return f"exit code {exit_code}"
    name = signal.Signals(-exit_code).name
    return f"{name} (usually out of memory, or killed manually)" if name == "SIGKILL" else name
