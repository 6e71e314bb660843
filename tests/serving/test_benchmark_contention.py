import os
import subprocess
import sys
import time

import psutil
import pytest

from numprune.serving.benchmark.contention import Contention, StolenTime, waited_share
from numprune.serving.benchmark.scheduler import ThreadTimes, standing_still, thread_times


def test_other_load_alone_is_no_reason():
    assert Contention(0.6, 0.6, stolen_share=0.1).reasons == []
    assert Contention(None, 0.02, 0.0).reasons == []


@pytest.mark.parametrize(
    ("contention", "what"),
    [
        (Contention(0.02, 0.95, 0.0), "candidate waited for a free CPU 95%"),
        (Contention(0.9, 0.02, 0.0), "baseline waited for a free CPU 90%"),
        (Contention(0.02, 0.02, 0.4), "hypervisor took 40%"),
    ],
)
def test_what_makes_a_measurement_meaningless_is_named(contention, what):
    (reason,) = contention.reasons
    assert what in reason


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's schedstat")
def test_a_computing_thread_is_seen_running():
    before = thread_times()
    started = time.process_time()
    while time.process_time() - started < 0.1:
        pass
    assert (thread_times() - before).ran_s >= 0.09


def test_the_waited_share_refers_to_the_whole_time():
    assert waited_share([ThreadTimes(1.0, 3.0), ThreadTimes(3.0, 1.0)]) == 0.5
    assert waited_share([ThreadTimes(0.0, 0.0)]) is None


def test_a_spinning_process_can_be_suspended():
    spinning = subprocess.Popen([sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    process = psutil.Process(spinning.pid)
    try:
        spinning.stdout.readline()
        with standing_still([spinning.pid, ended.pid]):
            deadline = time.monotonic() + 60
            while process.status() != psutil.STATUS_STOPPED:  # the signal is on its way
                assert time.monotonic() < deadline
            before = process.cpu_times()
            time.sleep(0.2)
            assert process.cpu_times() == before
        while process.cpu_times() == before:
            assert time.monotonic() < deadline
        with pytest.raises(ZeroDivisionError), standing_still([spinning.pid]):
            raise ZeroDivisionError
        assert process.status() != psutil.STATUS_STOPPED
    finally:
        spinning.kill()
        spinning.communicate()


def test_stolen_share_is_a_share():
    stolen = StolenTime()
    os.getpid()
    assert 0.0 <= stolen.share() <= 1.0
