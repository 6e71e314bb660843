import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from numprune.errors import IntegrityError
from numprune.export import manifest
from tests.fuzz.strangers import NAMES, documents, fuzz, named

CONTENT = b"content"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("made") / "artifact"
    with manifest.creating(made, kind="stage", parents={"base": "0" * 64}, facts={"a": [1, 2.5, None]}) as out:
        (out / "deep").mkdir()
        (out / "deep" / "data.bin").write_bytes(CONTENT)
    (made.parent / "x").write_bytes(CONTENT)  # what a path out of the folder would reach
    return made


GOOD: dict[str, Any] = {
    "schema": "numprune/manifest/1",
    "kind": "stage",
    "files": {"deep/data.bin": {"sha256": "0" * 64, "size": 7}},
    "parents": {"base": "0" * 64},
    "facts": {"a": [1, 2.5, None]},
    "digest": "0" * 64,
}


@fuzz
@given(documents(GOOD))
@example(json.dumps(GOOD | {"facts": {"a": 1}}).replace('"a": 1', '"a": 1e999').encode())
@example(json.dumps(GOOD | {"facts": {"a": 0}}).replace('"a": 0', '"a": ' + "[" * 500 + "]" * 500).encode())
@example(json.dumps(GOOD | {"facts": {"\ud800": "\ud800"}}).encode())
def test_a_manifest_is_read_or_refused(folder: Path, content: bytes) -> None:
    good = (folder / manifest.FILE_NAME).read_bytes()
    try:
        (folder / manifest.FILE_NAME).write_bytes(content)
        assert isinstance(named(manifest.read, folder), IntegrityError)  # no digest of these is right
        assert isinstance(named(manifest.verify, folder), IntegrityError)
    finally:
        (folder / manifest.FILE_NAME).write_bytes(good)
    manifest.verify(folder)


@fuzz
@given(st.sampled_from(NAMES) | st.text())
@example("../x")
def test_a_path_that_leaves_the_folder_is_never_verified(folder: Path, name: str) -> None:
    """Even where the digest is right, as whoever writes an artifact can make it."""
    entry = manifest.FileEntry(manifest.sha256_file(folder / "deep" / "data.bin"), len(CONTENT))
    good = (folder / manifest.FILE_NAME).read_bytes()
    try:
        text = manifest.Manifest("stage", {name: entry, "deep/data.bin": entry}, {}, {}).to_json()
        (folder / manifest.FILE_NAME).write_text(text)
        steps = name.split("/")
        plain = "\0" not in name and not {"", ".", ".."} & set(steps) and name != manifest.FILE_NAME
        assert isinstance(named(manifest.read, folder), IntegrityError) != plain
        assert isinstance(named(manifest.verify, folder), IntegrityError) == (name != "deep/data.bin")
    finally:
        (folder / manifest.FILE_NAME).write_bytes(good)


def test_links_devices_and_depth_are_refused(tmp_path: Path) -> None:
    made = tmp_path / "a"
    with manifest.creating(made, kind="stage") as out:
        (out / "data").write_bytes(CONTENT)
    for place in (lambda: (made / "data2").symlink_to(made / "data"), lambda: os.mkfifo(made / "data2")):
        place()
        assert "link or device" in str(named(manifest.verify, made))
        (made / "data2").unlink()
    (made / "loop").symlink_to(made)
    assert "a link" in str(named(manifest.verify, made))
    (made / "loop").unlink()
    manifest.verify(made)

    here = os.open(made, os.O_RDONLY)
    try:
        for _ in range(1500):
            os.mkdir("d", dir_fd=here)
            below = os.open("d", os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = below
        assert "nested too deeply" in str(named(manifest.verify, made))
    finally:
        os.close(here)
        subprocess.run(["rm", "-r", made / "d"], check=True)  # too deep for pytest, too


@pytest.mark.parametrize("size", [manifest.MAXIMUM_BYTES + 1, 1 << 40])
def test_an_oversized_manifest_is_not_read(tmp_path: Path, size: int) -> None:
    with (tmp_path / manifest.FILE_NAME).open("wb") as file:
        file.truncate(size)  # a hole: it takes no room
    assert "exceeds the" in str(named(manifest.read, tmp_path))
