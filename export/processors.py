"""The number of CPUs that this process may use: its affinity mask, and the CPU quota of its control group (v1 or v2).

A container with a quota of 2 CPUs on a machine with 64 sees all 64. With 64 threads, it uses up its quota within the
first milliseconds of each period and is then throttled.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path


def count() -> int:
    """Return the number of CPUs that this process may use, at least one."""
    return quota() or len(os.sched_getaffinity(0))


def quota(root: Path = Path("/")) -> int | None:
    """Return the quota in CPUs, rounded up, or None if there is none. `root` is that of /proc."""
    found = [math.ceil(share) for share in _shares(root)]
    least = min(found, default=None)
    return least if least is not None and least < len(os.sched_getaffinity(0)) else None


def _shares(root: Path) -> Iterator[float]:
    """Yield the quotas of this process's control groups and their parents, if they have any."""
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
        mounts = [line.split() for line in (root / "proc/self/mountinfo").read_text().splitlines()]
    except OSError:
        return
    for line in groups:
        _, controllers, group = line.split(":", 2)
        kind = "cgroup" if controllers else "cgroup2"
        if controllers and "cpu" not in controllers.split(","):
            continue
        for mount in mounts:
            # id, parent, device, root, mount point, options …, "-", file system, source, options
            system = mount[mount.index("-") + 1 :]
            if system[0] == kind and (not controllers or "cpu" in system[2].split(",")):
                yield from _shares_above(root / mount[4].lstrip("/"), mount[3], group)


def _shares_above(mount: Path, mounted: str, group: str) -> Iterator[float]:
    below = Path(group).relative_to(mounted) if Path(group).is_relative_to(mounted) else Path()
    for folder in (mount / below, *(mount / below).parents[: len(below.parts)]):
        try:
            if (folder / "cpu.max").exists():
                allowed, period = (folder / "cpu.max").read_text().split()
            else:
                allowed, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if allowed != "max" and int(allowed) > 0:
                yield int(allowed) / int(period)
        except (OSError, ValueError):
            continue  # the root group has no such file
