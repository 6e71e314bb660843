"""The measuring loop: one batch of prompts through a runtime, token by token, each step timed where it happens."""

from collections.abc import Callable
from time import perf_counter_ns

import torch
from torch import Tensor

from numprune.export.runtimes import Runtime
from numprune.serving.benchmark.samples import Generation


def generate(
    runtime: Runtime, prompts: Tensor, output_length: int, synchronize: Callable[[], None] = lambda: None
) -> Generation:
    """Greedy decoding of exactly `output_length` tokens for each row of `prompts`, (B, S) int64.

    A step's time runs from the call until the chosen token is on the host, as a server that streams would have it.
    Looking for NaN and infinite logits happens between the steps, outside every timing. `synchronize` waits for the
    device.
    """
    failed = torch.zeros(len(prompts), dtype=torch.bool)
    itl_ms = []

    synchronize()
    start = perf_counter_ns()
    logits = runtime.prefill(prompts)[:, -1]  # (B, V)
    tokens = logits.argmax(-1, keepdim=True).cpu()  # (B, 1)
    synchronize()
    ttft_ms = (perf_counter_ns() - start) / 1e6
    failed |= _not_finite(logits)

    for _ in range(output_length - 1):
        synchronize()
        start = perf_counter_ns()
        logits = runtime.decode(tokens)  # (B, V)
        tokens = logits.argmax(-1, keepdim=True).cpu()
        synchronize()
        itl_ms.append((perf_counter_ns() - start) / 1e6)
        failed |= _not_finite(logits)

    return Generation(prompts.shape[0], prompts.shape[1], ttft_ms, itl_ms, int(failed.sum()))


def _not_finite(logits: Tensor) -> Tensor:
    """(B, V) -> (B,) on the host."""
    return ~torch.isfinite(logits).all(-1).cpu()
