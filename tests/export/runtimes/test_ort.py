"""Where ONNX Runtime runs the nodes of a graph, which it does not report by itself."""

from collections.abc import Callable
from pathlib import Path

import pytest

from numprune.errors import MissingRuntime
from numprune.export import genai, onnx
from numprune.export.runtimes import ort


@pytest.mark.parametrize(("opset", "heavy"), [(23, {"Attention", "MatMul"}), (20, {"Softmax", "MatMul"})])
def test_operators_that_fall_back_to_the_cpu_are_detected(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, opset: int, heavy: set[str]
) -> None:
    onnx.export(tiny_checkpoint(), tmp_path / "onnx", opset=opset)
    session = ort._open(tmp_path / "onnx" / onnx.MODEL_FILE, ort.CPU, threads=1)
    assert ort.nodes_elsewhere(session, ort.CPU) == []
    assert heavy <= set(ort.nodes_elsewhere(session, ort.CUDA))
    with pytest.raises(MissingRuntime, match="fell back to CPUExecutionProvider"):
        ort._require_cuda(session, "")


def test_fused_operators_that_fall_back_to_the_cpu_are_detected(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    genai.export(tiny_checkpoint(), tmp_path / "out")
    session = ort._open(tmp_path / "out" / onnx.MODEL_FILE, ort.CPU, threads=1)
    fused = {"GroupQueryAttention", "SkipSimplifiedLayerNormalization", "MatMul"}
    assert fused <= set(ort.nodes_elsewhere(session, ort.CUDA))
