import pytest
import torch

from numprune.serving.benchmark import memory

MIB = 1 << 20


@pytest.fixture(params=["kernel", "sampled"])
def peak(request, monkeypatch):
    if request.param == "sampled":
        monkeypatch.setattr(memory, "_reset_high_water", lambda: False)
    made = memory.PeakResident()
    if request.param == "kernel" and made.method != "VmHWM":
        pytest.skip("this kernel does not let the mark be reset")
    return made


def test_a_past_peak_is_reported(peak):
    before = memory.resident_bytes()
    block = bytearray(64 * MIB)
    for _ in range(5):  # long enough for one sample
        memory.time.sleep(memory._SAMPLING_INTERVAL_S)
    assert len(block) == 64 * MIB
    del block
    assert memory.resident_bytes() < before + 32 * MIB
    assert peak.bytes() > before + 60 * MIB

    peak.restart()
    assert peak.bytes() < before + 32 * MIB


def test_the_peaks_of_all_gpus_are_added(monkeypatch):
    """A model that is spread over two has a part of its weights on each."""
    steps = []
    for name, stand_in in (
        ("init", lambda: steps.append("init")),
        ("device_count", lambda: 2),
        ("reset_peak_memory_stats", steps.append),
        ("max_memory_allocated", [7 * MIB, 5 * MIB].__getitem__),
    ):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    assert memory.PeakCounted().bytes() == 12 * MIB
    assert steps == ["init", 0, 1]
