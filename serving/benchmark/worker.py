"""The process in which one side of a benchmark lives: `python -m numprune.serving.benchmark.worker PARENT_PID`.

One JSON object a line: requests on stdin, answers on what was stdout when it started. It ends when stdin does, and, on
Linux, at once when its parent dies. Heavy imports come after all of that is arranged.
"""

import ctypes
import faulthandler
import json
import os
import signal
import sys
import traceback
from typing import NoReturn, TextIO

from numprune.errors import NumpruneError

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Answer requests until stdin ends. Whatever is no NumpruneError ends the process with its traceback on stderr."""
    faulthandler.enable()  # a crash in native code leaves a trace on stderr, whose last lines the parent shows
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; ending us is the parent's task
    die_with(int(sys.argv[1]))
    answers = reserve_stdout()

    from numprune.serving.benchmark.session import Session

    session = Session()
    for line in sys.stdin:
        request = json.loads(line)
        operation = request.pop("operation")
        try:
            answer = {"ok": session.operations[operation](**request)}
        except NumpruneError as error:
            answer = {"error": {"kind": type(error).__name__, "message": str(error)}}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def reserve_stdout() -> TextIO:
    """A stream on the present stdout. All else that is printed from now on, by native code too, goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def die_with(parent: int) -> None:
    """End this process when `parent` ends, even by kill -9 and while we compute. Without Linux, stdin's end does it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died before the call
            sys.exit("the parent is gone")


def run() -> NoReturn:
    """`main`, and out at once: nothing is left to save, and taking the libraries down in order takes seconds."""
    status = 0
    try:
        main()
    except Exception:
        traceback.print_exc()
        status = 1
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    run()
