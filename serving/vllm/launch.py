"""Run as a script, by any interpreter: `launch.py PARENT_PID COMMAND…` becomes COMMAND.

With a parent (0: none) the kernel sends the command a SIGTERM when that process ends, even by kill -9. It imports
nothing of ours: the interpreter is another environment's.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    parent = int(sys.argv[1])
    if parent and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)  # it outlives exec
        if os.getppid() != parent:  # it died before the call
            sys.exit("the parent is gone")
    os.execv(sys.argv[2], sys.argv[2:])  # noqa: S606 - no shell is what we want


if __name__ == "__main__":
    main()
