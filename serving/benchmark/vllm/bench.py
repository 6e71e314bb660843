"""Run as a script, by the interpreter of vLLM's environment: `vllm bench serve`, again and again in one process.

Each request, a line of JSON on stdin, is a command line of `vllm bench serve`; the answer, on what was stdout, says
that its result file is written. Importing vLLM takes longer than most runs, and this does it once. It imports nothing
of ours. It ends when stdin does, and by any mistake in a command line, with vLLM's own message as the last on stderr.
"""

import json
import os
import signal
import sys


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; ending us is the parent's task
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints is no answer

    from vllm.benchmarks.serve import add_cli_args  # what `vllm bench serve` is, which wants a distribution called vllm
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
