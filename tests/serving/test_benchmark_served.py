"""Two real vLLM servers under `vllm bench serve`."""

import dataclasses
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from numprune.flows.steps.reference_answers import answers_of
from numprune.serving.benchmark.vllm import BenchmarkFailed, ServedLoad
from numprune.serving.benchmark.vllm.client import start_bench
from numprune.serving.benchmark.vllm.run import run_once
from numprune.serving.benchmark.vllm.side import side_of
from numprune.serving.gates import Gate, Policy, judge
from numprune.serving.report import Report
from numprune.serving.vllm.environment import Environment
from numprune.serving.vllm.process import tagged
from numprune.serving.vllm.server import ServerError, serving
from tests.serving.releases import require_vllm

pytestmark = pytest.mark.vllm

LOAD = ServedLoad(prompts=1, prompt_length=8, output_length=4, concurrency=(2,), repeats=4)


@pytest.fixture
def vllm() -> Environment:
    return require_vllm()


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    """No process of a server outlives the test that started it."""
    before = {tag for _, tag in tagged("server-")}
    yield
    assert {tag for _, tag in tagged("server-")} <= before


def test_a_served_candidate_against_its_baseline(vllm: Environment, tiny_checkpoint: Callable[..., Path]) -> None:
    # vLLM's CPU kernels want heads of 32 and more.
    baseline = tiny_checkpoint(name="dense", head_dim=32)
    candidate = tiny_checkpoint(name="pruned", head_dim=32, num_attention_heads=2, num_key_value_heads=1)
    sizes = ["--prompts", "1", "--prompt-length", "8", "--output-length", "4", "--repeats", "4", "--kv-cache-mib", "8"]

    done = subprocess.run(
        [
            *(sys.executable, "-m", "numprune.flows.cli", "benchmark", candidate, "--baseline", baseline),
            *("--runtime", "vllm", "--vllm", vllm.python.parent.parent, "--concurrency", "1", "2", *sizes, "--json"),
        ],
        stdout=subprocess.PIPE,
        check=True,
    )

    report = Report.model_validate_json(done.stdout)
    speed = report.speed["vllm"]
    assert list(speed.concurrency) == ["1", "2"]
    assert speed.runtime["vllm"] == vllm.version
    assert speed.runtime["dtype"] == {"baseline": "float32", "candidate": "float32"}
    for level, requests in (("1", 4), ("2", 8)):
        figures = speed.concurrency[level]
        assert (figures.order, figures.failed_requests) == ("ABBAABBA", 0)
        for side in (figures.baseline, figures.candidate):
            assert side.ttft_ms.samples == side.tpot_ms.samples == side.e2e_ms.samples == requests
            assert side.itl_ms.samples <= requests * 3
            assert side.ttft_ms.p50 is None or side.e2e_ms.p50 > side.ttft_ms.p50 > 0
            assert side.output_tokens_per_s > 0
        for metric in (figures.ttft, figures.e2e, figures.output_tokens_per_s):
            assert metric.ratio.samples == 4
        assert figures.noise_floor["ttft"].neighbours == 1

    memory = report.memory["vllm"]
    # Half the KV heads, so twice the tokens in the same memory; vLLM keeps some blocks for itself.
    assert memory.kv_tokens.ratio == pytest.approx(2.0, rel=0.05)
    assert memory.baseline.kv_bytes_per_token == pytest.approx(2 * 2 * 2 * 32 * 4, rel=0.05)
    assert memory.candidate.weight_bytes < memory.baseline.weight_bytes
    assert memory.baseline.peak_bytes_run >= memory.baseline.peak_bytes_load > 100 << 20

    gates = (
        Gate(metric="memory.vllm.kv_tokens.ratio", bound="point", min=1.9),
        Gate(metric="speed.vllm.concurrency.2.output_tokens_per_s.ratio", bound="ci95_lower", min=1e-9),
    )
    outcomes = [gate.outcome for gate in judge(report, Policy(gates=gates)).gates]
    assert outcomes[0] == "pass"
    assert outcomes[1] in ("pass", "inconclusive")  # which it is, the machine decides


def test_failed_requests_and_a_dead_server_end_the_benchmark(
    vllm: Environment, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """And before that `numprune check-server` stays beside it, as it does in a pod: one server for it all."""
    folder = tiny_checkpoint(head_dim=32)
    answers_of(folder).write(tmp_path)
    options = ["--enforce-eager", "--max-model-len", "256", "--kv-cache-memory-bytes", str(8 << 20)]
    with (
        start_bench(vllm, folder, LOAD) as bench,
        serving(vllm, folder, name="dense", dtype="float32", options=options) as server,
    ):
        assert passes_check(tmp_path, server.url)
        side = side_of("dense", folder, server, on_gpu=False)
        before = bench.run(side, 2)
        assert (before.failed, len(before.succeeded)) == (0, 2)
        assert before.threads.ran_s > 0

        refused = dataclasses.replace(LOAD, prompt_length=300)  # longer than the server takes
        trace = bench.scratch / "trace.jsonl"
        trace.write_text(refused.trace())
        with pytest.raises(BenchmarkFailed, match=r"2 requests failed \(limit 0\), the last 2 of 2 at concurrency 2; "):
            run_once(dataclasses.replace(bench, load=refused), side, [side], 2, [])
        lenient = dataclasses.replace(refused, maximum_failed=2)
        assert run_once(dataclasses.replace(bench, load=lenient), side, [side], 2, []).failed == 2
        trace.write_text(LOAD.trace())

        for pid in side.processes:
            psutil.Process(pid).kill()
        with pytest.raises(ServerError, match="dense: vLLM was ended by SIGKILL"):
            bench.run(side, 2)


def passes_check(release: Path, url: str) -> bool:
    """Whether the command says so by its marker, stays, and ends by a SIGTERM."""
    marker = release / "passed"
    command = [
        sys.executable,
        "-m",
        "numprune.flows.cli",
        "check-server",
        str(release),
        "--url",
        url,
        "--dtype",
        "float32",
    ]
    with subprocess.Popen([*command, "--marker", str(marker)]) as process:
        deadline = time.monotonic() + 120
        while not marker.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
        process.terminate()
    return marker.exists() and process.returncode == 128 + signal.SIGTERM
