"""Seconds of work on a CPU or a GPU."""

import time
from collections.abc import Callable, Generator
from typing import Any

import torch


def now(device: torch.device) -> float:
    """Return a time in seconds, once all that was asked of `device` is done.

    With a single thread on a CPU it is processor time, which leaves out what else the machine does.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Return how long `work` takes."""
    start = now(device)
    work()
    return now(device) - start


def seconds_of_steps(
    work: Generator[None, None, Any], steps: int, patience: float, device: torch.device
) -> tuple[float, float]:
    """Return how long `work` takes that yields after each of `steps` equal steps, and the share of it that was run.

    After `patience` seconds it is left, and the rest is taken to be as fast as what was run after the first step, which
    may have had something to prepare.
    """
    start = first = last = now(device)
    done = 0
    for _ in work:
        last = now(device)
        done += 1
        if done == 1:
            first = last
        elif last - start > patience:
            break
    a_step = (last - first) / (done - 1) if done > 1 else 0.0
    return first - start + a_step * (steps - 1), done / steps
