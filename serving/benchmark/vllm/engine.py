"""Times models in vLLM, one engine after another in one process; a script for the interpreter of vLLM's environment.

Requests and responses are those of `numprune.serving.benchmark.worker`, as far as timing needs them: `load`, `prepare`
and `repeat`. The engine has a server's settings, but runs in this process and without HTTP: what is timed are its
steps. Importing vLLM takes longer than loading most models, and this does it only once. It imports nothing from
numprune. It ends when stdin closes.
"""

import gc
import json
import os
import signal
import sys
from itertools import pairwise
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import psutil  # vLLM needs it, too


class Refusal(Exception):
    """What was asked cannot be timed; the parent raises it as an InputError."""


class Session:
    """One engine at a time: `load`, then for each load `prepare` and any number of `repeat`."""

    def __init__(self) -> None:
        self._engine: Any = None
        self._prompts: list[list[int]] = []
        self._output_length = 0
        self._requests = 0  # so far: each has its own id

    def load(self, folder: str, options: dict[str, Any]) -> dict[str, Any]:
        """Start an engine on the checkpoint, with vLLM's `options`, in place of an earlier one."""
        from vllm.engine.arg_utils import EngineArgs
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.llm_engine import LLMEngine

        self._release()
        arguments = EngineArgs(model=folder, skip_tokenizer_init=True, **options)
        # On which the scheduler's limits depend.
        self._engine = LLMEngine.from_engine_args(arguments, UsageContext.OPENAI_API_SERVER)
        return {"vocabulary": self._engine.model_config.get_vocab_size()}

    def _release(self) -> None:
        from vllm.distributed import cleanup_dist_env_and_memory

        if self._engine is not None:
            self._engine.engine_core.shutdown()
            self._engine = None
            gc.unfreeze()
            gc.collect()
            cleanup_dist_env_and_memory()

    def prepare(self, token_ids: list[list[int]], batch_size: int, output_length: int) -> dict[str, Any]:
        """Accept a load of one batch. Raises Refusal if a server with these settings would divide it."""
        if len(token_ids) != batch_size:
            raise ValueError(f"{len(token_ids)} prompts in batches of {batch_size}; one batch is timed")
        most = self._engine.vllm_config.scheduler_config.max_num_seqs
        if batch_size > most:
            raise Refusal(f"the batch is {batch_size}, and vLLM runs at most {most} rows at a time here; choose fewer")
        self._prompts, self._output_length = token_ids, output_length
        gc.collect()
        gc.freeze()  # as in the other worker: a garbage collection would traverse the imported modules
        return {}

    def repeat(self) -> dict[str, Any]:
        """Run the batch once, each row for `output_length` tokens or more.

        A long batch is read in several steps of the scheduler, and the first rows are then ahead of the last ones. So
        a step counts from the first token of the last row on, while every row is generated.
        """
        from vllm import SamplingParams

        engine = self._engine
        longest = engine.model_config.max_model_len - len(self._prompts[0])
        greedy = SamplingParams(temperature=0, max_tokens=longest, ignore_eos=True, detokenize=False)
        names = [str(self._requests + index) for index in range(len(self._prompts))]
        self._requests += len(names)
        generated = dict.fromkeys(names, 0)
        ran, waited = _thread_times()
        started = perf_counter_ns()
        for name, prompt in zip(names, self._prompts, strict=True):
            engine.add_request(name, {"prompt_token_ids": prompt}, greedy)
        at: list[int] = []  # when the last row had each token
        while len(at) < self._output_length:
            outputs = engine.step()
            now = perf_counter_ns()
            for output in outputs:
                generated[output.request_id] = len(output.outputs[0].token_ids)
            if len(at) < min(generated.values()):
                at.append(now)
            if len(at) < self._output_length and any(output.finished for output in outputs):
                raise RuntimeError("a row ended while others were still read: steps would be of fewer rows")
        engine.abort_request(names)
        while engine.has_unfinished_requests():
            engine.step()
        steps = [(now - before) / 1e6 for before, now in pairwise(at)]
        batch = {
            "size": len(names),
            "prompt_length": len(self._prompts[0]),
            "ttft_ms": (at[0] - started) / 1e6,
            "itl_ms": steps,
            "failed": 0,
        }
        ran_now, waited_now = _thread_times()
        return {"batches": [batch], "threads": {"ran_s": ran_now - ran, "waited_s": waited_now - waited}}


def _thread_times() -> tuple[float, float]:
    """Seconds that the threads of this process and of its children, one for each device, ran and waited for a CPU."""
    ran_ns = waited_ns = 0
    for process in [os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))]:
        for file in Path(f"/proc/{process}/task").glob("*/schedstat"):
            try:
                ran, waited, _ = file.read_text().split()
            except (FileNotFoundError, ProcessLookupError):  # a thread, or a child, that ended meanwhile
                continue
            ran_ns, waited_ns = ran_ns + int(ran), waited_ns + int(waited)
    return ran_ns / 1e9, waited_ns / 1e9


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends this process
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints is not a response
    session = Session()
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any]
        try:
            answer = {"ok": getattr(session, request.pop("operation"))(**request)}
        except Refusal as refusal:
            answer = {"error": {"kind": "InputError", "message": str(refusal)}}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
