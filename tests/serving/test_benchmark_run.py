"""Two real workers on two real models."""

import json
import subprocess
import sys
import threading
import time

import psutil
import pytest

from numprune.errors import InputError
from numprune.export import onnx
from numprune.progress import Progress
from numprune.serving.benchmark import Load, WorkerError, pool, run_benchmark
from numprune.serving.benchmark.run import _interleaved, check_match
from numprune.serving.benchmark.samples import Repeat
from numprune.serving.report import Environment, RuntimeMemory, RuntimeSpeed

LOAD = Load(prompts=4, prompt_length=6, output_length=4, batch_size=2, repeats=4, warmup=1)

MODES = ("compiled", "eager")


def workers() -> list[psutil.Process]:
    children = psutil.Process().children()
    return [child for child in children if "numprune.serving.benchmark.worker" in child.cmdline()]


@pytest.mark.slow
def test_a_candidate_against_its_baseline(tiny_checkpoint):
    baseline = tiny_checkpoint(name="baseline")
    candidate = tiny_checkpoint(name="candidate", intermediate_size=32, num_attention_heads=2, num_key_value_heads=1)

    result = run_benchmark(candidate, baseline, "torch", LOAD, device="cpu", threads=1)

    assert json.loads(json.dumps(result, allow_nan=False)) == result
    speed = RuntimeSpeed.model_validate(result["speed"])
    assert (speed.order, speed.warmup, speed.repeats, speed.failed_requests) == ("ABBAABBA", 1, 4, 0)
    assert speed.load == LOAD.describe()
    assert speed.baseline.itl_ms.samples == speed.candidate.itl_ms.samples == 4 * 2 * 3
    for metric in (speed.ttft, speed.itl, speed.e2e, speed.decode_tokens_per_s, speed.prefill_tokens_per_s):
        assert metric.ratio.samples == 4
        assert 0 < metric.ratio.interval95[0] <= metric.ratio.value <= metric.ratio.interval95[1]
    assert speed.noise_floor["itl"].neighbours == 1

    memory = RuntimeMemory.model_validate(result["memory"])
    assert memory.candidate.kv_bytes_per_token / memory.baseline.kv_bytes_per_token == 0.5
    assert memory.candidate.weight_bytes < memory.baseline.weight_bytes
    assert memory.baseline.peak_bytes_run > memory.baseline.weight_bytes

    environment = Environment.model_validate(result["environment"])
    assert environment.valid == (not environment.reasons)
    for name in ("baseline", "candidate"):
        samples = result["samples"][name]
        assert (len(samples["warmup"]), len(samples["repeats"])) == (1, 4)
        assert samples["opened"]["load_s"] > 0
        rates = [Repeat.from_json(repeat).metrics()["decode_tokens_per_s"] for repeat in samples["repeats"]]
        assert min(rates) <= result["speed"][name]["decode_tokens_per_s"] <= max(rates)
    assert pool([result]) == result
    assert pool([result, result])["speed"]["decode_tokens_per_s"]["ratio"]["samples"] == 8
    assert workers() == []


@pytest.mark.slow
def test_without_a_compiler_both_sides_decode_eagerly_with_the_reason(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))  # what was compiled before needs none
    load = Load(prompts=1, prompt_length=4, output_length=4, repeats=4)
    folder = tiny_checkpoint(num_hidden_layers=1)
    result = run_benchmark(folder, folder, "torch", load, device="cpu", threads=1, torch_mode="compiled")
    for side in ("baseline", "candidate"):
        described = result["speed"]["runtime"][side]
        assert described["mode"] == "eager"
        for name in ("baseline", "candidate"):  # both tried: that takes memory
            assert f"the {name} cannot be compiled: torch.compile failed: " in described["not_compiled"]


def test_looks_in_different_modes_are_not_pooled():
    looks = [{"speed": {"runtime": {"baseline": {"mode": mode}, "candidate": {"mode": mode}}}} for mode in MODES]
    with pytest.raises(InputError, match=r"different modes \(compiled, eager\) .* benchmark\.torch_mode = 'eager'"):
        pool(looks)


@pytest.mark.slow
def test_a_baseline_against_itself_has_no_clear_difference(tiny_checkpoint, tmp_path):
    """The same folder twice. Timings of a busy machine can be anything, but not half as long again on one side."""
    folder = tmp_path / "onnx"
    onnx.export(tiny_checkpoint(), folder)
    load = Load(prompts=1, prompt_length=4, output_length=8, repeats=8)
    speed = run_benchmark(folder, folder, "onnxruntime", load, device="cpu", threads=1)["speed"]
    assert speed["runtime"]["baseline"]["provider"] == "CPUExecutionProvider"
    intervals = [speed[metric]["ratio"]["interval95"] for metric in ("ttft", "itl", "decode_tokens_per_s")]
    assert any(low / 1.5 <= 1 <= high * 1.5 for low, high in intervals)


def test_missing_folders_are_refused_before_any_process_starts(tiny_checkpoint, tmp_path):
    with pytest.raises(InputError, match=r"candidate .*nowhere"):
        run_benchmark(tmp_path / "nowhere", tiny_checkpoint(), "torch", LOAD)
    assert workers() == []


def test_a_load_beyond_the_context_is_refused_before_any_process_starts(tiny_checkpoint):
    folder = tiny_checkpoint()
    with pytest.raises(InputError, match=r"need 257 positions, .*max_position_embeddings = 256"):
        run_benchmark(folder, folder, "torch", Load(prompt_length=200, output_length=58))
    assert workers() == []


def test_mismatched_checkpoints_are_not_compared():
    on_cpu = {"vocabulary": 259, "gpu": False}
    check_match(on_cpu, on_cpu)
    with pytest.raises(InputError, match="baseline has 259 tokens, that of the candidate 300"):
        check_match(on_cpu, {"vocabulary": 300, "gpu": False})
    with pytest.raises(InputError, match="baseline runs on the CPU, the candidate on the GPU"):
        check_match(on_cpu, {"vocabulary": 259, "gpu": True})


def is_stopped(pid):
    return psutil.Process(pid).status() == psutil.STATUS_STOPPED


def test_each_side_is_measured_while_the_other_is_suspended():
    """Two processes of a kind that never rests, each asked in its turn."""
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    batch = {"size": 1, "prompt_length": 1, "ttft_ms": 1.0, "itl_ms": [1.0], "failed": 0}
    turns = []

    class Spinning:
        def __init__(self, name, process):
            self.name, self.pid = name, process.pid

        def ask(self, operation):
            deadline = time.monotonic() + 60
            while not (stopped := {name for name, worker in workers.items() if is_stopped(worker.pid)}):
                assert time.monotonic() < deadline  # the signal is on its way
            turns.append((self.name, stopped))
            return {"batches": [batch], "threads": {"ran_s": 1.0, "waited_s": 0.0}}

    workers = {name: Spinning(name, process) for name, process in zip(("baseline", "candidate"), spinning, strict=True)}
    try:
        repeats = _interleaved(2, workers, Progress(4, "benchmark", "run"), Repeat.from_json)
    finally:
        for process in spinning:
            process.kill()
            process.wait()
    assert {name: len(found) for name, found in repeats.items()} == {"baseline": 2, "candidate": 2}
    a, b = ("baseline", {"candidate"}), ("candidate", {"baseline"})
    assert turns == [a, b, b, a]


@pytest.mark.slow
def test_a_worker_killed_mid_run_ends_the_benchmark(tiny_checkpoint):
    folder = tiny_checkpoint()

    def kill_one_at_work() -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            for worker in workers():
                if worker.cpu_times().user > 0.2:
                    worker.kill()
                    return
            time.sleep(0.05)

    killer = threading.Thread(target=kill_one_at_work)
    killer.start()
    endless = Load(prompts=1, prompt_length=8, output_length=100, repeats=100_000)
    with pytest.raises(WorkerError, match="SIGKILL"):
        run_benchmark(folder, folder, "torch", endless, device="cpu", threads=1)
    killer.join()
    assert workers() == []
