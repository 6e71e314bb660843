"""Energy of a GPU, with a stand-in for NVML, so that no GPU is needed."""

import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from numprune.export.runtimes.torch_eager import TorchRuntime
from numprune.serving import energy
from numprune.serving.benchmark import session as sessions
from numprune.serving.benchmark.load import Load
from numprune.serving.benchmark.samples import ENERGY, Generation, Repeat
from numprune.serving.benchmark.sections import Look, speed_section
from numprune.serving.benchmark.session import Session
from numprune.serving.energy import open_meter, start_counting
from numprune.serving.report import Report, markdown, page
from tests.serving.pages import Parsed, full


class Nvml(SimpleNamespace):
    """What is used of pynvml; its counter, in mJ, goes up by 250 each time it is read."""

    class NVMLError(Exception):
        pass

    def __init__(self, problem: str = "") -> None:
        super().__init__()
        self.problem, self.opened, self.count = problem, [], 0

    def nvmlInit(self) -> None:  # noqa: N802 - NVML's names
        if self.problem:
            raise self.NVMLError(self.problem)

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        self.opened.append(uuid)
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, _: Any) -> int:  # noqa: N802
        if self.problem:
            raise self.NVMLError(self.problem)
        self.count += 250
        return self.count


class Driver:
    """What is used of CUDA's driver; its second device is NVML's first."""

    def __init__(self, status: int = 0) -> None:
        self.status = status

    def cuInit(self, _: int) -> int:  # noqa: N802 - CUDA's names
        return self.status

    def cuDeviceGet(self, _: Any, ordinal: int) -> int:  # noqa: N802
        assert ordinal == 0
        return self.status

    def cuDeviceGetUuid_v2(self, uuid: Any, _: Any) -> int:  # noqa: N802
        uuid.raw = UUID.bytes
        return self.status


UUID = uuid.UUID("5f3c0e6a-0102-0304-0506-0708090a0b0c")


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    found = Driver()
    monkeypatch.setattr(energy, "_open_driver", lambda: found)
    return found


@pytest.mark.usefixtures("driver")
def test_the_counter_is_that_of_the_gpu_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA and NVML count boards in different orders: only the UUID is the same."""
    nvml = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    meter, said = open_meter(on_gpu=True)
    assert meter is not None
    assert (nvml.opened, said) == ([f"GPU-{UUID}"], "NVML, the whole board")
    taken = start_counting(meter)
    assert taken() == 0.25
    nvml.problem = "GPU is lost"  # from now on
    assert taken() is None
    nvml.problem = ""
    assert taken() == 0.5
    assert start_counting(None)() is None


def test_an_unmeasured_energy_is_explained(monkeypatch: pytest.MonkeyPatch, driver: Driver) -> None:
    assert open_meter(on_gpu=False) == (None, "not measured on a CPU")
    monkeypatch.setitem(sys.modules, "pynvml", Nvml("Not Supported"))
    assert open_meter(on_gpu=True) == (None, "not measured: NVML: Not Supported")
    monkeypatch.setitem(sys.modules, "pynvml", Nvml())
    driver.status = 100
    assert open_meter(on_gpu=True) == (None, "not measured: CUDA's driver: error 100")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert open_meter(on_gpu=True) == (None, 'not measured: nvidia-ml-py is not installed: pip install "numprune[gpu]"')


@pytest.mark.usefixtures("driver")
def test_a_worker_counts_the_energy_of_each_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Nvml())
    session = Session()
    session._energy, _ = open_meter(on_gpu=True)
    session._work = lambda: [Generation(1, 4, 5.0, [1.0, 1.0, 1.0], 0)]
    assert Repeat.from_json(session.repeat()).metrics()[ENERGY] == 0.25 / 4
    session._energy = None
    answer = session.repeat()
    assert answer["joules"] is None
    assert ENERGY not in Repeat.from_json(answer).metrics()


def test_the_energy_of_a_model_on_several_boards_is_not_measured(
    monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Callable[..., Path]
) -> None:
    monkeypatch.setattr(sessions, "open_meter", lambda **_: (Nvml(), "NVML, the whole board"))
    one, several = "NVML, the whole board", "not measured: the model is spread over several GPUs"
    for spread, said in ((False, one), (True, several)):
        monkeypatch.setattr(TorchRuntime, "is_spread", spread)
        session = Session()
        session.load(str(tiny_checkpoint("llama")), "torch", "cpu", 1)
        assert (session._energy is None, session._facts["energy"]) == (spread, said)


def repeats(joules: float | None) -> list[Repeat]:
    batch = Generation(2, 8, 20.0, [5.0] * 4, 0)
    return [Repeat((batch,), 1.0, 0.0, None if joules is None else joules + drift) for drift in (0.0, 0.1, -0.1, 0.0)]


def test_the_report_has_joules_per_token_if_measured() -> None:
    load = Load(prompts=2, prompt_length=8, output_length=5, batch_size=2, repeats=4)
    measured = speed_section(load, [Look(repeats(20.0), repeats(10.0))], {})
    assert measured["baseline"][ENERGY] == pytest.approx(2.0)
    assert measured[ENERGY]["ratio"]["value"] == pytest.approx(0.5, rel=0.02)
    assert "neighbours" in measured["noise_floor"][ENERGY]
    absent = speed_section(load, [Look(repeats(None), repeats(None))], {})
    assert absent["baseline"][ENERGY] is None
    assert ENERGY not in absent
    assert ENERGY not in absent["baseline"]["by_repeat"]

    data = full()
    told = {}
    for name, section in (("measured", measured), ("absent", absent)):
        report = Report.model_validate({**data, "speed": {"torch": section}})
        told[name] = markdown(report), Parsed(page.html(report)).text
    assert "| energy, J per output token | 2 | 1 | 0.5" in told["measured"][0]
    assert "less" in told["measured"][0]
    assert "J per output token" in told["measured"][1]
    assert not any("J per output token" in text for text in told["absent"])
