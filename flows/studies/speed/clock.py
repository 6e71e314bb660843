"""Time work on a CPU or a GPU."""

import time
from collections.abc import Callable, Generator
from typing import Any

import torch


def now(device: torch.device) -> float:
    """Return a time in seconds after all pending work of `device` is done.

    With a single thread on a CPU, it is processor time, which excludes other programs.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds that `work` takes."""
    start = now(device)
    work()
    return now(device) - start


def seconds_of_steps(
    work: Generator[None, None, Any], steps: int, patience: float, device: torch.device
) -> tuple[float, float]:
    """Return the seconds of `work`, which yields after each of `steps` equal steps, and the share that was run.

    After `patience` seconds it is stopped and extrapolated from the steps after the first, which may include
    preparation.
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
