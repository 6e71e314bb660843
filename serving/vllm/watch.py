"""Run as `python -m numprune.serving.vllm.watch PARENT_PID TAG`: ends all processes with this tag when the parent ends.

It works however the parent ends, even by kill -9. A kernel signal (PR_SET_PDEATHSIG) is not enough: a starting vLLM may
lose its SIGTERM, and its children would not get one at all.
"""

import os
import sys
import time

from numprune.serving.vllm.process import end_tagged

_POLL_S = 0.5
_GRACE_S = 10.0


def main() -> None:
    parent, tag = int(sys.argv[1]), sys.argv[2]
    while os.getppid() == parent:
        time.sleep(_POLL_S)
    end_tagged(tag, _GRACE_S)


if __name__ == "__main__":
    main()
