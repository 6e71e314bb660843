"""Runs `vllm bench serve` repeatedly in one process; a script for the interpreter of vLLM's environment.

Each request, a line of JSON on stdin, is a command line of `vllm bench serve`; the response, on the original stdout,
confirms that its result file has been written. Importing vLLM takes longer than most runs, and this does it only once.
It imports nothing from numprune. It ends when stdin closes, or on an invalid command line, with vLLM's own message last
on stderr.
"""

import json
import os
import signal
import sys


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends this process
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints is not a response

    from vllm.benchmarks.serve import (
        add_cli_args,
    )  # the command itself needs a distribution named vllm
    from vllm.benchmarks.serve import main as bench_serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    for line in sys.stdin:
        request = json.loads(line)
        if request["operation"] == "bench":
            parser = FlexibleArgumentParser()
            add_cli_args(parser)
            bench_serve(parser.parse_args(request["arguments"]))
        answers.write(json.dumps({"ok": {}}) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
