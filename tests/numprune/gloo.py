"""Several processes of a run as threads of this one, joined by a real gloo group."""

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from numprune.processes import Processes


def together(count: int, work: Callable[[Processes], Any]) -> list[Any]:
    """Return what `work` returns or raises in each of `count` processes."""
    store, found = distributed.HashStore(), [None] * count

    def run(index: int) -> None:
        try:
            group = distributed.ProcessGroupGloo(store, index, count, timedelta(seconds=60))
            found[index] = work(Processes(index, count, torch.device("cpu"), group))
        except Exception as error:
            found[index] = error.with_traceback(None)  # whose frames would keep the connections open

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found
