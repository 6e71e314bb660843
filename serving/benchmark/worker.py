"""The process that runs one side of a benchmark: `python -m numprune.serving.benchmark.worker PARENT_PID`.

One JSON object per line: requests on stdin, responses on the original stdout. It ends when stdin closes and, on Linux,
immediately when its parent dies. Heavy imports come after that is set up.
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
    """Handle requests until stdin closes. Exceptions other than NumpruneError end the process with a traceback."""
    faulthandler.enable()  # a crash in native code leaves a trace on stderr, whose last lines the parent shows
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends this process
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
    """Return a stream on the current stdout; from now on all other output, including native code's, goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def die_with(parent: int) -> None:
    """End this process with `parent`, even after kill -9. On other systems than Linux, the end of stdin does that."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died before the call
            sys.exit("the parent is gone")


def run() -> NoReturn:
    """Run `main` and exit immediately: an orderly shutdown of the libraries takes seconds."""
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
