import os
import subprocess
import sys
import time

import pytest

from numprune.serving.benchmark.contention import Contention, SideContention, StolenTime
from numprune.serving.benchmark.scheduler import cpu_seconds, thread_times

QUIET = SideContention(waited_share=0.02, idle_cpus=0.01)


def test_a_machine_with_other_load_is_no_reason():
    half = SideContention(waited_share=0.6, idle_cpus=0.1)
    assert Contention(half, half, stolen_share=0.1).reasons == []
    assert Contention(SideContention(None, 0.0), QUIET, 0.0).reasons == []


@pytest.mark.parametrize(
    ("contention", "what"),
    [
        (Contention(QUIET, SideContention(0.95, 0.0), 0.0), "candidate waited for a free CPU 95%"),
        (Contention(SideContention(0.1, 0.9), QUIET, 0.0), "idle baseline kept 0.90 CPUs busy"),
        (Contention(QUIET, QUIET, 0.4), "hypervisor took 40%"),
    ],
)
def test_what_makes_a_measurement_meaningless_is_named(contention, what):
    (reason,) = contention.reasons
    assert what in reason


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's schedstat")
def test_a_thread_that_computes_is_seen_to_run():
    before = thread_times()
    started = time.process_time()
    while time.process_time() - started < 0.1:
        pass
    assert (thread_times() - before).ran_s >= 0.09


def test_cpu_time_tells_a_busy_process_from_an_idle_one():
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    idle = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 60
        while cpu_seconds(busy.pid) < 0.5 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert cpu_seconds(busy.pid) >= 0.5
        settled = cpu_seconds(idle.pid)
        time.sleep(0.2)
        assert cpu_seconds(idle.pid) - settled < 0.15
    finally:
        for process in (busy, idle):
            process.kill()
            process.communicate()


def test_stolen_share_is_a_share():
    stolen = StolenTime()
    os.getpid()
    assert 0.0 <= stolen.share() <= 1.0
