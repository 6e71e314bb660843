"""Checkpoints written tensor by tensor are read back unchanged."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from numprune.errors import IntegrityError
from numprune.export import weights
from numprune.export.headers import read_headers
from numprune.export.shards import writing

TENSORS = {
    "a": torch.arange(12.0).view(3, 4),
    "b.bias": torch.randn(5, generator=torch.Generator().manual_seed(0)),
    "c": torch.randn(40, 30, generator=torch.Generator().manual_seed(1)),
    "d": torch.ones(1),
}
FLOAT32 = dict.fromkeys(TENSORS, torch.float32)


def write(folder: Path, shard_bytes: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """All of `TENSORS`, and what is read back of each file."""
    with writing(folder, dict.fromkeys(TENSORS, dtype), shard_bytes) as writer:
        writer.add(TENSORS)
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shard_bytes", [10**6, 40, 1])
def test_tensors_are_read_in_the_requested_dtype(tmp_path: Path, shard_bytes: int, dtype: torch.dtype) -> None:
    read = write(tmp_path, shard_bytes, dtype)
    assert read.keys() == TENSORS.keys()
    assert all(torch.equal(read[name], tensor.to(dtype)) for name, tensor in TENSORS.items())
    stored = read_headers(tmp_path)
    assert {name: torch.Size(header.shape) for name, header in stored.items()} == {
        name: tensor.shape for name, tensor in TENSORS.items()
    }


def test_one_shard_is_a_single_file_and_several_have_an_index(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    write(tmp_path / "one", 10**6)
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["model.safetensors"]
    (tmp_path / "more").mkdir()
    write(tmp_path / "more", 40)  # a and b.bias together, c alone although it is larger, d
    files = [f"model-0000{shard}-of-00003.safetensors" for shard in (1, 2, 3)]
    assert sorted(path.name for path in (tmp_path / "more").iterdir()) == [*files, "model.safetensors.index.json"]
    index = json.loads((tmp_path / "more" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {"a": files[0], "b.bias": files[0], "c": files[1], "d": files[2]}
    assert index["metadata"] == {"total_parameters": 1218, "total_size": 2436}


def test_each_tensor_has_its_own_data_type(tmp_path: Path) -> None:
    with writing(tmp_path, {**FLOAT32, "c": torch.bfloat16}) as writer:
        writer.add(TENSORS)
    assert [header.dtype for header in read_headers(tmp_path).values()].count("BF16") == 1
    read = load_file(tmp_path / "model.safetensors")
    assert read["c"].equal(TENSORS["c"].bfloat16())
    assert all(read[name].equal(TENSORS[name]) for name in ("a", "b.bias", "d"))


def test_an_out_of_range_value_stops_the_write(tmp_path: Path) -> None:
    with (
        pytest.raises(IntegrityError, match=r"^c: 7e\+04 is out of range of float16"),
        writing(tmp_path, {"c": torch.float16}) as writer,
    ):
        writer.add_slabs("c", (40, 30), [TENSORS["c"][:39], torch.full((1, 30), -7e4)])
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_tensor_may_be_written_in_blocks_of_rows(tmp_path: Path) -> None:
    with writing(tmp_path, {"c": torch.float32}) as writer:
        writer.add_slabs("c", (40, 30), TENSORS["c"].split(7))
    header = read_headers(tmp_path)["c"]
    assert torch.equal(weights.read_rows(header), TENSORS["c"])
    assert torch.equal(weights.read_rows(header, 38, 40), TENSORS["c"][38:])


def test_transformers_loads_the_shards(tiny_checkpoint, tmp_path: Path) -> None:
    folder = tiny_checkpoint()
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    with writing(folder, dict.fromkeys(model.state_dict(), torch.float32), 100_000) as writer:
        writer.add(model.state_dict())
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_caller_errors_leave_no_weights(tmp_path: Path) -> None:
    def shape() -> None:
        with writing(tmp_path / "shape", FLOAT32) as writer:
            writer.add_slabs("c", (40, 31), [TENSORS["c"]])

    def twice() -> None:
        with writing(tmp_path / "twice", FLOAT32) as writer:
            writer.add(TENSORS)
            writer.add({"a": TENSORS["a"]})

    def unannounced() -> None:
        with writing(tmp_path / "unannounced", {}) as writer:
            writer.add(TENSORS)

    for mistake, message in (
        (shape, "4960 bytes, not 4800"),
        (twice, "written already"),
        (unannounced, "has no entry"),
    ):
        (tmp_path / mistake.__name__).mkdir()
        with pytest.raises(ValueError, match=message):
            mistake()
        assert not list((tmp_path / mistake.__name__).glob("*.safetensors"))
