"""The choice of compute precision, casts that never lose a value silently, and exports in half precision."""

from collections.abc import Callable
from pathlib import Path

import onnx as onnx_format
import pytest
import torch
from safetensors.torch import load_file, save_file

from numprune.errors import InputError, IntegrityError, ParityError
from numprune.export import noise, onnx, parity, parity_encoder, precision
from numprune.export.noise import Noise
from numprune.export.runtimes import open_runtime
from tests.conftest import build_tiny, write_checkpoint

Checkpoint = Callable[..., Path]


@pytest.mark.parametrize(
    ("asked", "stored", "runtime", "device", "chosen"),
    [
        ("auto", "bfloat16", "vllm", "cpu", "bfloat16"),
        ("auto", "bfloat16", "torch", "cpu", "float32"),
        ("auto", "bfloat16", "torch", "cuda", "bfloat16"),
        ("auto", "float16", "tensorrt", "cuda", "float16"),
        ("auto", "float16", "onnxruntime", "cpu", "float32"),
        ("auto", "float32", "onnxruntime", "cuda", "float32"),
        ("auto", "float64", "torch", "cuda", "float32"),
        ("float16", "float32", "onnxruntime", "cpu", "float16"),
        ("bfloat16", "float32", "onnxruntime", "cuda", "bfloat16"),
        ("bfloat16", "float32", "vllm", "cpu", "bfloat16"),
    ],
)
def test_the_precision_is_the_requested_one_or_suits_the_device(
    asked: str, stored: str, runtime: str, device: str, chosen: str
) -> None:
    assert precision.choose(asked, stored, runtime, device) == chosen


def test_a_precision_unsupported_by_the_runtime_is_refused() -> None:
    with pytest.raises(InputError, match="no bfloat16 kernels for a CPU; use auto, float32 or float16, or a GPU"):
        precision.choose("bfloat16", "bfloat16", "onnxruntime", "cpu")
    with pytest.raises(InputError, match="dtype='int8': choose one of auto, float32, bfloat16, float16"):
        precision.choose("int8", "float32", "torch", "cpu")


def test_noise_is_limited_in_mean_and_percentile() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 40, generator=generator)
    one_wrong = logits.clone()
    one_wrong[3] = one_wrong[3].roll(1)
    floor = noise.of_logits(logits, logits + 1e-3 * torch.randn(50, 40, generator=generator))
    assert noise.of_logits(logits, logits + 1.0).p99 < 1e-5  # a constant changes no probability
    assert 0.7e-3 < floor.mean < 0.9e-3  # of a normal distribution: 0.8 standard deviations
    assert noise.of_logits(logits, one_wrong).share_of(floor) > 10  # a single position of fifty
    assert Noise(4 * floor.mean, 4 * floor.p99).share_of(floor) == 1
    assert Noise(5 * floor.mean, floor.p99).share_of(floor) > 1
    assert noise.of_errors(torch.tensor([0.0, torch.nan])).share_of(floor) == torch.inf


@pytest.mark.parametrize(("network", "opset"), [({"attention_bias": True}, 23), ({"family": "qwen3"}, 20)])
def test_a_decoder_in_float16(
    tiny_checkpoint: Checkpoint, tmp_path: Path, network: dict[str, object], opset: int
) -> None:
    base = tiny_checkpoint(**network)
    data = f"{onnx.MODEL_FILE}.data"
    made = onnx.export(base, tmp_path / "onnx", opset=opset, dtype="float16")
    found = parity.check(base, tmp_path / "onnx", "onnxruntime", device="cpu", threads=1)
    assert made.facts["dtype"] == found["dtype"] == found["candidate"]["dtype"] == "float16"
    assert 0 < found["noise"]["mean"] < 4 * found["noise_floor"]["mean"]
    full = onnx.export(base, tmp_path / "full", opset=opset)
    ports = onnx_format.load(tmp_path / "onnx" / onnx.MODEL_FILE, load_external_data=False).graph
    types = {value.name: value.type.tensor_type.elem_type for value in [*ports.input, *ports.output]}
    assert types["logits"] == onnx_format.TensorProto.FLOAT
    assert types["past_key_values.0.key"] == types["present.0.value"] == onnx_format.TensorProto.FLOAT16
    assert made.files[data].size < 0.55 * full.files[data].size
    whole = open_runtime("onnxruntime", tmp_path / "full", device="cpu", threads=1).describe()
    assert 2 * found["candidate"]["kv_bytes_per_token"] == whole["kv_bytes_per_token"]


def test_a_bfloat16_graph_is_valid(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """No CPU runs it: its types are checked, and its weights are those of the checkpoint, rounded."""
    base = tiny_checkpoint()
    onnx.export(base, tmp_path / "onnx", dtype="bfloat16")
    graph = onnx_format.load(tmp_path / "onnx" / onnx.MODEL_FILE).graph
    stored = {one.name: one for one in graph.initializer}
    weight = "model.layers.0.mlp.up_proj.weight"
    assert stored[f"{weight}.T"].data_type == onnx_format.TensorProto.BFLOAT16
    assert stored["rotary.frequencies"].data_type == onnx_format.TensorProto.FLOAT
    raw = torch.frombuffer(bytearray(stored[f"{weight}.T"].raw_data), dtype=torch.bfloat16)
    expected = load_file(base / "model.safetensors")[weight]
    assert torch.equal(raw.view(expected.T.shape), expected.T.to(torch.bfloat16))


def test_a_wrong_export_in_float16_is_refused(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    base, other = tiny_checkpoint(), tiny_checkpoint(name="other")
    weights = load_file(other / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] *= 1.02
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    onnx.export(other, tmp_path / "onnx", dtype="float16")
    with pytest.raises(ParityError, match="the limit is 4 times the error of PyTorch in float16, which is"):
        parity.check(base, tmp_path / "onnx", "onnxruntime", device="cpu", threads=1)


@pytest.mark.slow
def test_an_encoder_in_float16(tmp_path: Path) -> None:
    base = write_checkpoint(build_tiny("bert", num_hidden_layers=1), tmp_path / "base")
    onnx.export(base, tmp_path / "onnx", dtype="float16")
    found = parity_encoder.check(base, tmp_path / "onnx", "onnxruntime", device="cpu", threads=1)
    assert found["dtype"] == "float16"
    assert 0 < found["noise"]["p99"] <= found["tolerance"]


def test_a_checkpoint_computed_in_bfloat16(tiny_checkpoint: Checkpoint) -> None:
    base = tiny_checkpoint()
    found = parity.check(base, base, "torch", device="cpu", threads=1, dtype="bfloat16")
    assert [found[side]["dtype"] for side in ("candidate", "reference")] == ["bfloat16", "float32"]
    assert found["candidate"]["weight_bytes"] == found["reference"]["weight_bytes"] / 2


def test_a_weight_too_large_for_float16_is_named(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    base = tiny_checkpoint()
    weights = load_file(base / "model.safetensors")
    name = "model.layers.0.self_attn.o_proj.weight"
    weights[name][0, 0] = 70_000
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(IntegrityError, match=rf"{name}.*: 7e\+04 is out of range of float16 .*use bfloat16 or"):
        onnx.export(base, tmp_path / "onnx", dtype="float16")
    with pytest.raises(IntegrityError, match=f"{name} has values that are NaN or infinite in float16; use bfloat16"):
        open_runtime("torch", base, device="cpu", dtype="float16")
    assert not (tmp_path / "onnx").exists()
