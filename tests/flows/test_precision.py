"""A recipe with a precision: what is exported, proved, timed and reported is in it."""

from pathlib import Path

from numprune.export import manifest
from numprune.export.checkpoint import weight_bytes
from numprune.flows import chain, recipe
from numprune.flows.steps import checks
from numprune.serving import report


def test_a_release_in_float16(tiny: Path, tmp_path: Path) -> None:
    changes = ["export.dtype=float16", "prune.criterion=magnitude", "prune.compensation=none", "evaluate.prompts=[]"]
    changes += ["benchmark.runtimes=['torch', 'onnxruntime']", "export.targets=['vllm', 'onnx']"]
    run = checks.prepare(recipe.load(tiny / "recipe.toml", changes), tmp_path / "w")
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
    assert "In half precision no error is bounded" in page
    assert "onnxruntime computes in float16" in page
