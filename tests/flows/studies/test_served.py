"""The table of served models; tests/serving/test_benchmark_served.py has real runs."""

import pytest

from numprune.flows.studies import served
from numprune.serving.benchmark.scheduler import ThreadTimes
from numprune.serving.benchmark.sections import Look
from numprune.serving.benchmark.vllm import ServedLoad
from numprune.serving.benchmark.vllm.metrics import KvCache
from numprune.serving.benchmark.vllm.requests import Request, Requests
from numprune.serving.benchmark.vllm.sections import Footprint, memory_section, speed_section

LOAD = ServedLoad(prompts=2, prompt_length=10, output_length=2, concurrency=(1, 4), repeats=4)


def found(scale: float, kv_tokens: int, reasons: tuple[str, ...] = ()) -> dict[str, object]:
    def repeats(concurrency: int, scale: float) -> list[Requests]:
        requests = (Request(10, 2, 30 * scale, (7 * scale,)),) * LOAD.requests(concurrency)
        return [
            Requests(concurrency, requests, (), scale * drift, 1.0, ThreadTimes(1, 0)) for drift in (1, 1.1, 1, 0.9)
        ]

    looks = {level: [Look(repeats(level, 1.0), repeats(level, scale))] for level in LOAD.concurrency}
    dense, pruned = Footprint(9, KvCache(1000, 10, 100), 9, 9, 9), Footprint(6, KvCache(kv_tokens, 10, 1), 9, 9, 9)
    return {
        "speed": speed_section(LOAD, looks, {"vllm": "0.32.0"}),
        "memory": memory_section(dense, pruned),
        "environment": {
            "cpu": "A CPU",
            "cores": 2,
            "memory_bytes": 1 << 30,
            "platform": "Linux",
            "valid": not reasons,
            "reasons": reasons,
        },
    }


def test_the_table_has_a_line_per_model_and_concurrency() -> None:
    results = {"uniform": found(0.8, 1400), "per-layer": found(0.5, 1600, ("the machine was shared",))}
    rows = [served.Row("dense", 5_000_000, results["uniform"])]
    rows += [served.Row(name, 4_000_000, result) for name, result in results.items()]

    lines = served.markdown(rows, LOAD).splitlines()

    assert "tokens in 256 MiB of KV cache" in lines[0]
    assert {line.count("|") for line in lines[:8]} == {9}
    assert [line.split(" | ")[0] for line in lines[2:8]] == [f"| {name}" for name in ("dense", *results) for _ in "12"]
    assert lines[2].startswith("| dense | 5,000,000 | 1,000 | 1 | 4.0 | 1 | ")
    assert lines[3] == "| dense | 5,000,000 | 1,000 | 4 | 16.0 | 1 | 30.0 | 7.0 |"
    assert lines[5] == "| uniform | 4,000,000 | 1,400 | 4 | 20.0 | 1.25 (1.25 to 1.25) | 24.0 | 5.6 |"
    assert lines[7].startswith("| per-layer | 4,000,000 | 1,600 | 4 | 32.0 | 2.00 ")
    assert "vLLM 0.32.0 on 2 cores of A CPU" in lines[9]
    assert lines[10] == "Not valid, per-layer: the machine was shared"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--methods", "obs/uniform"], "method is 'obs/uniform'"),
        (["--concurrency", "0"], "load.concurrency"),
        (["--vllm", "/nowhere"], "no virtual environment there"),
        (["/nowhere/model"], "/nowhere/model"),
    ],
)
def test_errors_are_reported_before_any_work(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert served.main(arguments) == 1
    assert said in capsys.readouterr().err
