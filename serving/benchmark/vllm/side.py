"""One model on its server, with memory and scheduling times of the server's processes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from numprune.export.checkpoint import weight_bytes
from numprune.serving.benchmark.contention import waited_share
from numprune.serving.benchmark.scheduler import ThreadTimes, family, thread_times
from numprune.serving.benchmark.vllm.load import ServedLoad
from numprune.serving.benchmark.vllm.metrics import read_kv_cache
from numprune.serving.benchmark.vllm.requests import Requests
from numprune.serving.benchmark.vllm.sections import Footprint
from numprune.serving.vllm.server import Server


@dataclass
class Side:
    """`processes` are the server's, all started once it is ready; `repeats` are by concurrency."""

    name: str
    folder: Path
    server: Server
    processes: Sequence[int]
    peak_bytes_load: int | None  # None on a GPU
    warmup: dict[int, list[Requests]] = field(default_factory=dict)
    repeats: dict[int, list[Requests]] = field(default_factory=dict)

    def threads(self) -> ThreadTimes:
        times = [thread_times(pid) for pid in self.processes]
        return ThreadTimes(sum(found.ran_s for found in times), sum(found.waited_s for found in times))

    def footprint(self, load: ServedLoad) -> Footprint:
        return Footprint(
            weight_bytes=weight_bytes(self.folder),
            kv_cache=read_kv_cache(self.server.url, load.positions),
            kv_cache_bytes=load.kv_cache_bytes,
            peak_bytes_load=self.peak_bytes_load,
            peak_bytes_run=None if self.peak_bytes_load is None else _peak_bytes(self.processes),
        )

    def waited_share(self) -> float | None:
        """Over all measured repeats: see `Contention`."""
        return waited_share(repeat.threads for repeats in self.repeats.values() for repeat in repeats)


def side_of(name: str, folder: Path, server: Server, *, on_gpu: bool) -> Side:
    """The side of a server that is ready."""
    processes = family(server.pid)
    return Side(name, folder, server, processes, None if on_gpu else _peak_bytes(processes))


def _peak_bytes(processes: Sequence[int]) -> int:
    """The sum of the kernel's high-water marks of resident memory; shared memory counts once per process."""
    total = 0
    for pid in processes:
        marks = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM:")]
        total += int(marks[0].split()[1]) * 1024 if marks else psutil.Process(pid).memory_info().rss
    return total
