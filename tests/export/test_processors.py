"""The CPU quota, read from files as kernels and container runtimes lay them out."""

import os
from pathlib import Path

import pytest

from numprune.export import processors

V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n"
V1 = "35 24 0:30 {root} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"


def machine(root: Path, group: str, mounts: str, files: dict[str, str]) -> Path:
    """A root folder with these files."""
    for path, text in {"proc/self/cgroup": group, "proc/self/mountinfo": mounts, **files}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


@pytest.fixture(autouse=True)
def sixteen_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(16)))


@pytest.mark.parametrize(
    ("group", "mounts", "files", "cpus"),
    [
        ("0::/\n", V2, {"sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
        ("0::/\n", V2, {"sys/fs/cgroup/cpu.max": "150000 100000\n"}, 2),  # rounded up
        ("0::/\n", V2, {"sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        ("0::/\n", V2, {"sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ("0::/\n", V2, {"sys/fs/cgroup/cpu.max": "1600000 100000\n"}, None),  # no less than the mask
        ("0::/\n", V2, {}, None),
        (  # the quota is the pod's, not the container's
            "0::/pod/container\n",
            V2,
            {"sys/fs/cgroup/pod/container/cpu.max": "max 100000\n", "sys/fs/cgroup/pod/cpu.max": "300000 100000\n"},
            3,
        ),
        (  # Docker with version 1: the host's path of the group is what is mounted
            "4:memory:/docker/x\n3:cpu,cpuacct:/docker/x\n",
            V1.format(root="/docker/x"),
            {
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "400000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            4,
        ),
        (
            "3:cpu,cpuacct:/\n",
            V1.format(root="/"),
            {
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            None,
        ),
    ],
)
def test_the_quota_of_a_control_group(
    tmp_path: Path, group: str, mounts: str, files: dict[str, str], cpus: int | None
) -> None:
    assert processors.quota(machine(tmp_path, group, mounts, files)) == cpus


def test_a_machine_without_procfs(tmp_path: Path) -> None:
    assert processors.quota(tmp_path) is None
    assert processors.count() == 16


def test_threads_follow_the_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both for what is started, by its environment, and for ONNX Runtime, which does not read that."""
    from numprune.flows import children

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(processors, "quota", lambda: None)
    children.prepare_threads()
    assert "OMP_NUM_THREADS" not in os.environ
    monkeypatch.setattr(processors, "quota", lambda: 3)
    children.prepare_threads()
    assert os.environ.pop("OMP_NUM_THREADS") == "3"
