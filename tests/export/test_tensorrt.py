"""What can be tested of TensorRT without its libraries; engines need them and a GPU."""

import importlib.util

import onnx as onnx_format
import pytest
import torch

from numprune.errors import InputError, MissingRuntime
from numprune.export import onnx, tensorrt
from numprune.export.runtimes import open_runtime

HERE = importlib.util.find_spec("tensorrt") is not None and torch.cuda.is_available()


@pytest.mark.skipif(HERE, reason="TensorRT is here")
def test_without_tensorrt_the_error_names_the_package(tiny_checkpoint, tmp_path):
    base = tiny_checkpoint()
    with pytest.raises(MissingRuntime, match=r"pip install 'numprune\[tensorrt\]'|CUDA device"):
        tensorrt.export(base, tmp_path / "engine")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_folder_of_another_kind_is_refused(tiny_checkpoint, tmp_path):
    onnx.export(tiny_checkpoint(), tmp_path / "onnx")
    with pytest.raises(InputError, match="holds 'onnx', not an engine"):
        open_runtime("tensorrt", tmp_path / "onnx")


@pytest.mark.parametrize("sizes", [{"max_batch": 0}, {"max_length": 1}, {"workspace_gib": 0}])
def test_invalid_sizes_are_refused(tiny_checkpoint, tmp_path, sizes):
    with pytest.raises(InputError, match=r"max_batch=.*need at least"):
        tensorrt.export(tiny_checkpoint(), tmp_path / "engine", **sizes)


@pytest.mark.parametrize("family", ["bert", "llamagen"])
def test_what_is_not_a_language_model_is_refused(tiny_checkpoint, tmp_path, family):
    with pytest.raises(InputError, match="engines can only be built for language models; export other models with"):
        tensorrt.export(tiny_checkpoint(family), tmp_path / "engine")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("profile", [tensorrt.PREFILL, tensorrt.DECODE])
def test_profiles_cover_every_graph_input_and_lengths_add_up(tiny_checkpoint, tmp_path, profile):
    onnx.export(tiny_checkpoint(), tmp_path / "onnx", opset=tensorrt.OPSET)
    graph = onnx_format.load(tmp_path / "onnx" / onnx.MODEL_FILE, load_external_data=False).graph
    inputs = {
        value.name: tuple(dim.dim_value or -1 for dim in value.type.tensor_type.shape.dim) for value in graph.input
    }
    shapes = tensorrt.profile_shapes(inputs, profile, max_batch=4, max_length=64)
    assert shapes.keys() == inputs.keys()
    for size in range(3):
        batch, new = shapes["input_ids"][size]
        past = shapes["past_key_values.0.key"][size]
        assert shapes["attention_mask"][size] == (batch, past[2] + new)
        assert past == (batch, 2, past[2], 16)
        assert 1 <= shapes["logits_to_keep"][size][0] <= new
        assert (past[2] == 0) == (profile == tensorrt.PREFILL)
        assert new == 1 or profile == tensorrt.PREFILL
    for low, usual, high in shapes.values():
        assert all(a <= b <= c for a, b, c in zip(low, usual, high, strict=True))
    assert shapes["attention_mask"][2] == (4, 64)
