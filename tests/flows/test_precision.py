"""A recipe with a precision: exports, parity, timings and report all use it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from numprune.documents import Reading
from numprune.errors import InputError
from numprune.export import manifest
from numprune.export.checkpoint import weight_bytes
from numprune.flows import chain, evaluation, recipe
from numprune.flows.steps import benchmark, export
from numprune.flows.steps.checks.recipe import check
from numprune.flows.steps.prepare import prepare
from numprune.flows.steps.quantize import quantize_checkpoint
from numprune.quantization import Scheme
from numprune.serving import report


def test_a_release_in_float16(tiny: Path, tmp_path: Path) -> None:
    changes = ["export.dtype=float16", "prune.criterion=magnitude", "prune.compensation=none", "evaluate.prompts=[]"]
    changes += ["benchmark.runtimes=['torch', 'onnxruntime']", "export.targets=['vllm', 'onnx']"]
    run = prepare(recipe.load(tiny / "recipe.toml", changes), tmp_path / "w")
    assert set(run.precision.values()) == {"float16"}
    judged = chain.judge(run, run.make)
    found = report.read(judged.report.path / "report.json")
    assert found.sizes is not None
    assert (found.sizes.dtype.baseline, found.sizes.dtype.candidate) == ("float32", "float16")
    assert found.sizes.weight_bytes.candidate == weight_bytes(judged.parts["checkpoint"])
    assert found.sizes.kv_bytes_per_token.candidate <= found.sizes.kv_bytes_per_token.baseline / 2
    for runtime in ("torch", "onnxruntime"):
        assert {*found.speed[runtime].dtype.model_dump().values()} == {"float16"}
        memory = found.memory[runtime].baseline
        assert memory.kv_bytes_per_token == found.sizes.kv_bytes_per_token.baseline / 2
        assert memory.weight_bytes < 0.6 * found.sizes.weight_bytes.baseline
    assert {name: facts["dtype"] for name, facts in found.parity.items()} == dict.fromkeys(found.parity, "float16")
    for part in ("checkpoint", "onnx"):
        assert manifest.read(judged.parts[part]).facts["dtype"] == "float16"
    page = (judged.report.path / "report.html").read_text(encoding="utf-8")
    assert "In half precision there is no fixed tolerance" in page
    assert "onnxruntime computes in float16" in page


def test_an_unsupported_benchmark_is_refused_once(tiny: Path, tmp_path: Path) -> None:
    changes = ["export.dtype=bfloat16", "export.targets=['onnxruntime']", "benchmark.device=cpu"]
    changes += ["benchmark.runtimes=['onnxruntime']", "benchmark.torch_mode=eager"]
    with pytest.raises(InputError) as caught:
        check(recipe.load(tiny / "recipe.toml", changes), tmp_path / "w")
    said = str(caught.value)
    assert said.count("no bfloat16 kernels for a CPU") == 1
    assert "benchmark.torch_mode = 'eager': torch is not among benchmark.runtimes; omit it" in said


def test_a_network_unsupported_by_the_fused_export_is_timed_in_the_standard_one(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    sides = [tiny_checkpoint(name="a"), tiny_checkpoint(name="b", head_dim=24)]
    assert benchmark.exported_as("onnxruntime", sides[:1], "float32") == "onnxruntime"
    assert benchmark.exported_as("onnxruntime", sides, "float32") == "onnx"


def test_a_precision_unsupported_by_the_fused_export_is_timed_in_the_standard_one(
    tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "runtime_device", lambda _: "cuda")
    sides = [tiny_checkpoint()]
    assert benchmark.exported_as("onnxruntime", sides, "float16") == "onnxruntime"
    assert benchmark.exported_as("onnxruntime", sides, "float32") == "onnx"


def test_quantized_weights_are_not_timed_dequantized(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, quantized = tiny_checkpoint(num_hidden_layers=1), tmp_path / "quantized"
    quantize_checkpoint(base, Scheme("w4a16", 32), quantized, torch.device("cpu"))
    with pytest.raises(
        InputError, match=r"\(w4a16, .*\) are for CPUs, .*, not float16; leave dtype out or use float32"
    ):
        benchmark.benchmark_report(str(quantized), str(base), "onnxruntime", None, None, Reading(), dtype="float16")
    sides = [base, quantized]
    assert benchmark.exported_as("onnxruntime", sides, "float32") == "onnxruntime"
    assert benchmark.exported_as("torch", sides, "float16") is None
    monkeypatch.setattr(benchmark, "runtime_device", lambda _: "cuda")
    with pytest.raises(InputError, match="on CUDA its GroupQueryAttention only supports float16 and bfloat16"):
        benchmark.exported_as("onnxruntime", sides, "float32")


def test_float32_on_cuda_is_refused_before_anything_is_written(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "device_of", lambda *_: "cuda")
    with pytest.raises(InputError, match="only supports float16 and bfloat16"):
        export.export_and_prove(tiny_checkpoint(), tmp_path / "out", "onnxruntime")
    assert list(tmp_path.glob("out*")) == []


def test_parity_runs_on_the_benchmark_device(tiny: Path, tmp_path: Path) -> None:
    run = prepare(recipe.load(tiny / "recipe.toml", ["benchmark.device=cpu"]), tmp_path / "w")
    assert evaluation.prove(run, "onnx", run.base, run.base, "candidate").arguments["device"] == "cpu"
    assert evaluation.prove(run, "tensorrt", run.base, run.base, "candidate").arguments["device"] == "auto"
