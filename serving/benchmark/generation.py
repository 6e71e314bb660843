"""The measuring loop: one batch of prompts through a runtime, token by token, each step timed in process."""

from time import perf_counter_ns

import torch
from torch import Tensor

from numprune.export.runtimes import Runtime
from numprune.serving.benchmark.samples import Generation


def generate(runtime: Runtime, prompts: Tensor, output_length: int) -> Generation:
    """Greedy decoding of exactly `output_length` tokens for each row of `prompts`, (B, S) int64.

    A step is timed from the call until the next token has been chosen on the host, as in a streaming server. Runtimes
    return logits on the host, so the device is idle when the clock is read. The check for NaN and infinite logits
    happens between steps and is not timed.
    """
    start = perf_counter_ns()
    logits = runtime.prefill(prompts, last_only=True)[:, -1]  # (B, V)
    tokens = logits.argmax(-1, keepdim=True)  # (B, 1)
    ttft_ms = (perf_counter_ns() - start) / 1e6
    finite = torch.isfinite(logits).all(-1)  # (B,)

    itl_ms = []
    for _ in range(output_length - 1):
        start = perf_counter_ns()
        logits = runtime.decode(tokens)  # (B, V)
        tokens = logits.argmax(-1, keepdim=True)
        itl_ms.append((perf_counter_ns() - start) / 1e6)
        finite &= torch.isfinite(logits).all(-1)

    rows, prompt_length = prompts.shape
    return Generation(rows, prompt_length, ttft_ms, itl_ms, failed=int((~finite).sum()))
