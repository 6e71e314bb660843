"""The measuring loop for encoders: batches through a runtime, each pass timed in process."""

from collections.abc import Iterable
from time import perf_counter_ns

import torch
from torch import Tensor

from numprune.export.runtimes.encoder import Encoder
from numprune.serving.benchmark.passes import Pass


def encode(encoder: Encoder, batches: Iterable[Tensor], passes: int) -> list[Pass]:
    """`passes` forward passes of each batch: token ids (B, S), or images (B, C, height, width).

    A pass is timed from the call until its output is on the host. The check for NaN and infinity is not timed.
    """
    found = []
    for batch in batches:
        size, length = len(batch), batch.shape[1] if encoder.image is None else encoder.tokens
        for _ in range(passes):
            start = perf_counter_ns()
            output = encoder.forward(batch)
            latency_ms = (perf_counter_ns() - start) / 1e6
            failed = int((~torch.isfinite(output).flatten(1).all(-1)).sum())
            found.append(Pass(size, length, latency_ms, failed))
    return found
