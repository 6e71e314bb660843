from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save_file

from numprune.errors import IntegrityError, NumpruneError
from numprune.export import headers, weights
from numprune.export.checkpoint import check_finite
from tests.fuzz.strangers import NAMES, changed, documents, fuzz, named, written

DATA = bytes(64)
HEADER: dict[str, Any] = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32]},
    "b": {"dtype": "BF16", "shape": [16], "data_offsets": [32, 64]},
}


def tensor(dtype: str, shape: list[int], start: int, end: int) -> bytes:
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    return written({"a": entry, "b": {"dtype": "U8", "shape": [64 - end], "data_offsets": [end, 64]}} if end else {})


@fuzz
@given(
    documents(HEADER)
    | st.builds(
        tensor,
        st.sampled_from(["F32", "F8_E4M3", "I64", "BOOL", "F4", "f32", "", "__import__('os')"]),
        st.lists(st.integers(-2, 2**64), max_size=4),
        st.sampled_from([0, 8, 2**63, 2**64, -1]),
        st.sampled_from([0, 8, 64, 2**63]),
    ),
    st.none() | st.sampled_from([0, 1, 8, 2**31, 2**63 - 1, 2**63, 2**64 - 1]),
)
@example(written({"a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}, "b": HEADER["b"]}), None)
@example(written({"a": {"dtype": "F32", "shape": [0, 4], "data_offsets": [0, 0]}}), None)
@example(written({"a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}})[:-1] + b', "a": 1}', None)
def test_a_header_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, header: bytes, length: int | None
) -> None:
    folder = tmp_path_factory.mktemp("weights")
    for data in (DATA, b""):
        content = (len(header) if length is None else length).to_bytes(8, "little") + header + data
        (folder / headers.SINGLE).write_bytes(content)
        found = named(headers.read_headers, folder)
        if isinstance(found, NumpruneError):
            continue
        for stored in found.values():  # what is said to be there, is
            assert stored.offset + stored.bytes <= len(content)
            read = torch.cat([slab.flatten() for slab in weights.slabs(stored)])
            assert read.numel() * read.element_size() == stored.bytes
            assert weights.read_tensor(stored).shape == stored.shape
        check_finite(found)
        headers.weight_bytes(folder)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "model"
    folder.mkdir()
    save_file({"a": torch.zeros(2)}, folder / "one.safetensors")
    save_file({"b": torch.zeros(2)}, folder / "two.safetensors")
    save_file({"a": torch.zeros(2)}, folder.parent / "x.safetensors")
    (folder / "d.safetensors").mkdir()
    return folder


INDEX: dict[str, Any] = {"metadata": {"total_size": 16}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
ESCAPES = ["../x.safetensors", "/x.safetensors", "a/one.safetensors", "d.safetensors", "pytorch_model.bin", *NAMES]


@fuzz
@given(documents(INDEX) | changed(INDEX).map(written))
@example(b'{"weight_map": ' + b"[" * 100_000)
@example(b'{"weight_map": {"a": ' + b"1" * 5000 + b"}}")
def test_an_index_is_read_or_refused(shards: Path, content: bytes) -> None:
    (shards / headers.INDEX).write_bytes(content)
    found = named(headers.read_headers, shards)
    assert isinstance(found, NumpruneError) or set(found) <= {"a", "b"}


@fuzz
@given(st.sampled_from(ESCAPES))
def test_a_shard_outside_the_folder_is_never_read(shards: Path, name: str) -> None:
    (shards / headers.INDEX).write_bytes(written({"weight_map": {"a": name, "b": "two.safetensors"}}))
    assert isinstance(named(headers.read_headers, shards), IntegrityError)


def test_an_oversized_index_is_not_read(shards: Path) -> None:
    with (shards / headers.INDEX).open("wb") as file:
        file.truncate(1 << 40)
    assert "exceeds the" in str(named(headers.read_headers, shards))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "model.ckpt"])
def test_pickles_are_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch pickled'\ntR.")
    assert name in str(named(headers.read_headers, tmp_path))
    assert not (tmp_path / "pickled").exists()
