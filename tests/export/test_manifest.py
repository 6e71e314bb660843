"""Artifact folders: complete or absent, and every alteration is detected."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from numprune.errors import InputError, IntegrityError
from numprune.export import manifest


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    folder = tmp_path / "artifact"
    with manifest.creating(folder, kind="checkpoint", parents={"base": "0" * 64}, facts={"ratio": 0.3}) as content:
        (content / "weights.bin").write_bytes(bytes(range(256)) * 40)
        (content / "sub").mkdir()
        (content / "sub" / "ünï.txt").write_text("two")
    return folder


def leftovers(parent: Path) -> list[Path]:
    return sorted(parent.glob(".*.partial"))


def test_a_created_folder_verifies_and_reads_back(artifact: Path) -> None:
    found = manifest.verify(artifact)
    assert (found.kind, dict(found.parents), dict(found.facts)) == ("checkpoint", {"base": "0" * 64}, {"ratio": 0.3})
    assert sorted(found.files) == ["sub/ünï.txt", "weights.bin"]
    assert found.files["weights.bin"].size == 10240
    assert found.files["weights.bin"].sha256 == manifest.sha256_file(artifact / "weights.bin")
    assert manifest.folder_digest(artifact) == found.digest == manifest.read(artifact).digest
    assert leftovers(artifact.parent) == []


def test_digest_depends_on_content_parents_and_facts_but_not_on_place_or_time(tmp_path: Path) -> None:
    def make(name: str, text: str = "x", **options: Any) -> str:
        with manifest.creating(tmp_path / name, kind="stage", **options) as content:
            (content / "file").write_text(text)
        return manifest.read(tmp_path / name).digest

    first = make("a", parents={"p": "1"}, facts={"o": [1, None]})
    assert make("b", parents={"p": "1"}, facts={"o": [1, None]}) == first
    others = {make("c", text="y"), make("d", parents={"p": "2"}), make("e", facts={"o": [1, 0]}), first}
    assert len(others) == 4


def test_an_existing_folder_is_not_overwritten(artifact: Path) -> None:
    with (
        pytest.raises(InputError, match="already exists"),
        manifest.creating(artifact, kind="stage"),
    ):
        pytest.fail("the body must not run")
    manifest.verify(artifact)


def test_an_error_in_the_body_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with manifest.creating(tmp_path / "out", kind="stage") as content:
            (content / "half").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_links_do_not_become_artifacts(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    with pytest.raises(IntegrityError, match="link"), manifest.creating(tmp_path / "out", kind="stage") as content:
        (content / "link").symlink_to(tmp_path / "secret")
    assert not (tmp_path / "out").exists()


def test_facts_that_are_not_json_are_refused_before_any_work(tmp_path: Path) -> None:
    for facts in ({"x": float("nan")}, {"x": object()}):
        with pytest.raises((TypeError, ValueError)), manifest.creating(tmp_path / "o", kind="s", facts=facts):  # type: ignore[arg-type]
            pytest.fail("the body must not run")
    assert list(tmp_path.iterdir()) == []


# --- alterations ----------------------------------------------------------------------------------


def flip_a_bit(folder: Path) -> None:
    raw = bytearray((folder / "weights.bin").read_bytes())
    raw[5000] ^= 1
    (folder / "weights.bin").write_bytes(raw)


def truncate(folder: Path) -> None:
    os.truncate(folder / "weights.bin", 10239)


def remove(folder: Path) -> None:
    (folder / "weights.bin").unlink()


def add(folder: Path) -> None:
    (folder / "sub" / "extra.bin").write_text("")


def replace_by_link(folder: Path) -> None:
    (folder / "weights.bin").rename(folder.parent / "elsewhere")
    (folder / "weights.bin").symlink_to(folder.parent / "elsewhere")


def replace_folder_by_link(folder: Path) -> None:
    (folder / "sub").rename(folder.parent / "sub")
    (folder / "sub").symlink_to(folder.parent / "sub")


@pytest.mark.parametrize(
    ("alter", "named"),
    [
        (flip_a_bit, "weights.bin: its SHA-256"),
        (truncate, "weights.bin: 10239 bytes"),
        (remove, "weights.bin: missing"),
        (add, "sub/extra.bin: not in the manifest"),
        (replace_by_link, "weights.bin: a link"),
        (replace_folder_by_link, "sub: a link"),
    ],
)
def test_verify_names_the_altered_file(artifact: Path, alter: Any, named: str) -> None:
    alter(artifact)
    with pytest.raises(IntegrityError, match=named):
        manifest.verify(artifact)
    with pytest.raises(IntegrityError):
        manifest.folder_digest(artifact)


def rewrite(folder: Path, change: Any) -> None:
    """Alter the manifest as someone would who also sets its digest right."""
    raw = json.loads((folder / "manifest.json").read_text())
    change(raw)
    content = {key: value for key, value in raw.items() if key != "digest"}
    raw["digest"] = manifest._digest(content)
    (folder / "manifest.json").write_text(json.dumps(raw))


@pytest.mark.parametrize("path", ["../outside", "/etc/hostname", "sub/../../outside", "./x", "sub//x", "", ".", "a\0b"])
def test_a_manifest_cannot_point_outside(artifact: Path, path: str) -> None:
    (artifact.parent / "outside").write_text("x")
    rewrite(artifact, lambda raw: raw["files"].update({path: {"sha256": "0" * 64, "size": 1}}))
    with pytest.raises(IntegrityError, match="not a plain relative path"):
        manifest.read(artifact)


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw["files"].update({"manifest.json": {"sha256": "0" * 64, "size": 1}}),
        lambda raw: raw["files"].update({"x": {"sha256": "0" * 63, "size": 1}}),
        lambda raw: raw["files"].update({"x": {"sha256": "0" * 64, "size": -1}}),
        lambda raw: raw["files"].update({"x": {"sha256": "0" * 64, "size": "1"}}),
        lambda raw: raw.update({"schema": "numprune/manifest/2"}),
        lambda raw: raw.update({"surprise": 1}),
        lambda raw: raw.pop("kind"),
        lambda raw: raw.update({"facts": []}),
    ],
)
def test_a_malformed_manifest_is_refused(artifact: Path, change: Any) -> None:
    rewrite(artifact, change)
    with pytest.raises(IntegrityError, match=r"manifest\.json"):
        manifest.read(artifact)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"\xff", b"[1]", b'{"kind": "a", "kind": "b"}', b'{"kind": NaN}', b"[" * 100_000]
)
def test_a_manifest_that_is_not_a_json_object_is_refused(artifact: Path, text: bytes) -> None:
    (artifact / "manifest.json").write_bytes(text)
    with pytest.raises(IntegrityError, match=r"manifest\.json"):
        manifest.read(artifact)


def test_an_altered_fact_is_detected(artifact: Path) -> None:
    path = artifact / "manifest.json"
    path.write_text(path.read_text().replace("0.3", "0.4"))
    with pytest.raises(IntegrityError, match="digest"):
        manifest.read(artifact)


def test_a_huge_or_linked_or_missing_manifest_is_refused(artifact: Path) -> None:
    path = artifact / "manifest.json"
    whole = path.read_bytes()
    path.write_bytes(whole + b" " * manifest.MAXIMUM_BYTES)
    with pytest.raises(IntegrityError, match="exceeds the"):
        manifest.read(artifact)
    path.unlink()
    with pytest.raises(IntegrityError, match="missing"):
        manifest.read(artifact)
    (artifact.parent / "other.json").write_bytes(whole)
    path.symlink_to(artifact.parent / "other.json")
    with pytest.raises(IntegrityError, match="not a regular file"):
        manifest.read(artifact)
    with pytest.raises(InputError, match="no such folder"):
        manifest.read(artifact.parent / "nowhere")


def test_a_folder_without_a_manifest_has_a_digest(tmp_path: Path) -> None:
    hub, plain = tmp_path / "snapshot", tmp_path / "plain"
    for folder in (hub, plain):
        folder.mkdir()
    (plain / "config.json").write_text("{}")
    (tmp_path / "blob").write_text("{}")
    (hub / "config.json").symlink_to(tmp_path / "blob")  # as a hub's cache keeps it
    (hub / ".cache").mkdir()
    (hub / ".cache" / "time").write_text("now")
    digest = manifest.folder_digest(plain)
    assert manifest.folder_digest(hub) == digest
    (plain / "config.json").write_text("{ }")
    assert manifest.folder_digest(plain) != digest
    (tmp_path / "blob").unlink()
    with pytest.raises(IntegrityError, match=r"config\.json"):
        manifest.folder_digest(hub)


def test_file_permissions_follow_the_umask(tmp_path):
    """safetensors writes its files for their owner only."""
    (tmp_path / "other").touch()
    with manifest.creating(tmp_path / "made", kind="checkpoint") as folder:
        (folder / "closed").touch(mode=0o600)
    modes = {path.stat().st_mode for path in (tmp_path / "other", *(tmp_path / "made").iterdir())}
    assert len(modes) == 1
