"""Images as arrays of codes."""

import json
import re

import numpy as np
import pytest
from safetensors.numpy import save_file

from numprune.documents import read_documents
from numprune.errors import InputError

CODES = np.array([[1, 2, 3], [4, 5, 6]])


def test_every_format_gives_the_same_images(tmp_path):
    np.save(tmp_path / "a.npy", CODES.astype(np.uint16))
    save_file({"codes": CODES, "labels": np.array([7, 8])}, tmp_path / "b.safetensors")
    records = [{"codes": row, "label": label} for row, label in zip(CODES.tolist(), (7, 8), strict=True)]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "d.json").write_text(json.dumps(records))
    for name, labels in (("a.npy", [None, None]), *((name, [7, 8]) for name in ("b.safetensors", "c.jsonl", "d.json"))):
        found = read_documents([tmp_path / name])
        assert [document.codes for document in found] == [(1, 2, 3), (4, 5, 6)], name
        assert [document.label for document in found] == labels, name
        assert [document.name for document in found] == [f"{name}:1", f"{name}:2"]
        assert found[0].text == "1 2 3"


def test_parquet_has_a_column_of_codes(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"codes": CODES.tolist(), "label": [7, 8]})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert [document.codes for document in read_documents([tmp_path / "a.parquet"])] == [(1, 2, 3), (4, 5, 6)]


@pytest.mark.parametrize(
    ("name", "tensors", "message"),
    [
        ("a.npy", CODES[0], "codes are int64 [3]; they must be integers (images, codes)"),
        ("a.npy", CODES / 2, "codes are float64 [2, 3]; they must be integers (images, codes)"),
        ("a.safetensors", {"tokens": CODES}, "has no tensor 'codes'"),
        ("a.safetensors", {"codes": CODES, "labels": np.array([1])}, "has 1 labels for 2 images"),
        ("a.safetensors", {"codes": CODES, "labels": np.array([1.0, 2.0])}, "labels are float64 [2]"),
    ],
)
def test_other_arrays_are_refused(tmp_path, name, tensors, message):
    if name.endswith("npy"):
        np.save(tmp_path / name, tensors)
    else:
        save_file(tensors, tmp_path / name)
    with pytest.raises(InputError, match=re.escape(message)):
        read_documents([tmp_path / name])


@pytest.mark.parametrize("name", ["a.npy", "a.safetensors"])
def test_damaged_and_missing_files_are_named(tmp_path, name):
    with pytest.raises(InputError, match=f"{name}: does not exist"):
        read_documents([tmp_path / name])
    (tmp_path / name).write_bytes(b"no array at all")
    with pytest.raises(InputError, match=f"{name}: cannot be read"):
        read_documents([tmp_path / name])


def test_other_files_named_npy_are_refused(tmp_path):
    header = b"{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000, 64), }".ljust(117) + b"\n"
    contents = {
        "empty": b"",
        "huge": b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header,
        "header": b"\x93NUMPY\x01\x00\x03\x00(((",
    }
    for name, content in contents.items():
        (tmp_path / f"{name}.npy").write_bytes(content)
        with pytest.raises(InputError, match=f"{name}.npy: cannot be read"):
            read_documents([tmp_path / f"{name}.npy"])
    np.savez(tmp_path / "a.npz", codes=CODES)
    (tmp_path / "a.npz").rename(tmp_path / "a.npy")
    with pytest.raises(InputError, match=r"a.npy: is an .npz archive; save its array with numpy.save"):
        read_documents([tmp_path / "a.npy"])


def test_an_array_of_python_objects_is_not_unpickled(tmp_path):
    np.save(tmp_path / "a.npy", np.array([object()]), allow_pickle=True)
    with pytest.raises(InputError, match=r"a.npy: cannot be read: .*allow_pickle"):
        read_documents([tmp_path / "a.npy"])


@pytest.mark.parametrize("codes", [[], [1.5], ["1"], [True], 3])
def test_records_with_other_codes_are_refused(tmp_path, codes):
    (tmp_path / "a.jsonl").write_text(json.dumps({"codes": codes}))
    with pytest.raises(InputError, match='its field "codes" must be a list of integers'):
        read_documents([tmp_path / "a.jsonl"])
