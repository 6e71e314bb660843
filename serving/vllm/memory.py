"""The default memory of a server on CPUs.

vLLM's own default is 0.92 of the machine's memory, and it refuses to start if more than 8 % is in use.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

OPTION = "--gpu-memory-utilization"  # on CPUs, a share of the machine's memory
_OPTIONS = {OPTION, "--device-memory-utilization", "--kv-cache-memory-bytes"}
_VARIABLE = "VLLM_CPU_KVCACHE_SPACE"
_CGROUP = Path("/sys/fs/cgroup")
_LIMITS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))  # v2, v1


@dataclass(frozen=True)
class Memory:
    """Memory of this machine, in bytes."""

    total: int
    available: int


def of_machine(cgroup: Path = _CGROUP) -> Memory:
    """The machine's memory or the container's limit, from the same source as vLLM, whose total the share refers to."""
    machine = psutil.virtual_memory()
    for limit, usage in _LIMITS:
        allowed = _number(cgroup / limit)
        if allowed is not None and allowed < machine.total:
            left = max(0, allowed - (_number(cgroup / usage) or 0))
            return Memory(allowed, min(machine.available, left))
    return Memory(machine.total, machine.available)


def share(memory: Memory, weight_bytes: int) -> float:
    """The share for the weights and half of the remaining free memory, which leaves room for a second server."""
    return int(500 * (memory.available + weight_bytes) / memory.total) / 1000


def is_set(options: Iterable[str], variables: Mapping[str, str]) -> bool:
    """Whether vLLM options or environment variables set its memory."""
    given = {option.partition("=")[0].replace("_", "-") for option in options}
    return bool(variables.get(_VARIABLE)) or not given.isdisjoint(_OPTIONS)


def _number(path: Path) -> int | None:
    """The number in a kernel file; None for `max` or a missing file."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
