"""Full and read-only disks: real, small file systems in memory."""

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.flows.conftest import Answered
from tests.flows.faults import QUICK, command, stage

Command = Callable[..., Answered]

pytestmark = pytest.mark.slow

BYTES = 48 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk for one test."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={BYTES}", "none", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, free: int) -> Path:
    """Leave `free` bytes; return the file whose removal makes room again."""
    ballast = disk / "ballast"
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - free)
    return ballast


def refused(answered: Answered, *words: str) -> None:
    """Exit code 1, and a last line with all the words."""
    assert answered.is_error
    assert "Traceback" not in answered.err
    last = answered.err.strip().splitlines()[-1]
    assert last.startswith("numprune: error: ")
    for word in words:
        assert word in last


@pytest.mark.parametrize("name", ["baseline", "prune", "export-onnx", "report"])
def test_the_disk_fills_up_during_a_stage(numprune: Command, disk: Path, finished: Path, tiny: Path, name: str) -> None:
    """The stage's folder and the space needed are named; once there is room, the run resumes."""
    workspace = Path(shutil.copytree(finished, disk / "w"))
    lost = stage(workspace, name)
    shutil.rmtree(lost)
    ballast = fill(disk, 12 << 10)
    answered = numprune(*command(tiny / "recipe.toml", workspace))
    refused(
        answered, str(lost), "No space left on device: more than ", " bytes are needed, ", " are free; free some space"
    )
    assert not list((workspace / "stages").glob(".*.partial"))
    ballast.unlink()
    again = numprune(*command(tiny / "recipe.toml", workspace))
    assert again.code == 0, again.err
    made = {found["name"].split()[0] for found in again.json["stages"] if not found["reused"]}
    assert made == {name.split("-")[0]}


def test_the_disk_fills_up_while_publishing(numprune: Command, disk: Path, finished: Path, tiny: Path) -> None:
    """First there is no room for the release, then none for the registry's copy, then enough."""
    workspace = Path(shutil.copytree(finished, disk / "w"))
    (release,) = (workspace / "releases").glob("tiny-*")
    (stored,) = (workspace / "registry" / "artifacts").glob("*/artifacts/release")
    size = sum(path.stat().st_size for path in release.rglob("*"))
    shutil.rmtree(release)
    shutil.rmtree(stored)
    ballast = fill(disk, size // 2)
    answered = numprune(*command(tiny / "recipe.toml", workspace))
    refused(answered, str(release), " bytes are needed, ", " are free; free some space")
    ballast.unlink()
    ballast = fill(disk, size + size // 2)
    answered = numprune(*command(tiny / "recipe.toml", workspace))
    refused(answered, str(stored), " bytes are needed, ", " are free; free some space")
    ballast.unlink()
    again = numprune(*command(tiny / "recipe.toml", workspace))
    assert (again.code, again.json["version"]) == (0, "tiny/1")
    assert numprune("registry", "verify", "tiny/1", "--workspace", workspace).code == 0
    assert not list(workspace.rglob(".*.partial"))


def test_the_disk_fills_up_while_the_registry_is_created(numprune: Command, disk: Path, finished: Path) -> None:
    (release,) = (finished / "releases").glob("tiny-*")
    ballast = fill(disk, 64 << 10)
    refused(numprune("registry", "publish", release, "tiny", "--workspace", disk / "w"), str(disk), "full")
    ballast.unlink()
    assert numprune("registry", "publish", release, "tiny", "--workspace", disk / "w").code == 0


@pytest.mark.parametrize("free", [64 << 10, 450 << 10])
@pytest.mark.parametrize("name", ["prune", "quantize"])
def test_working_layer_by_layer_without_disk_space(
    numprune: Command, disk: Path, tiny: Path, name: str, free: int
) -> None:
    """No room for hidden states, then none for the weights."""
    how = {"prune": ["--ratio", "0.25", "--stream"], "quantize": ["--scheme", "w8a8"]}[name]
    arguments = [name, tiny / "base", disk / "out", *how, "--text", tiny / "train.txt"]
    arguments += ["--samples", "12", "--sequence-length", "64"]
    ballast = fill(disk, free)
    answered = numprune(*arguments)
    refused(answered, f"{disk / 'out'}: ", " bytes ", " are free", "No space left on device", "free some space there")
    assert ".partial" not in answered.err
    assert sorted(path.name for path in disk.iterdir()) == ["ballast"]
    ballast.unlink()
    assert numprune(*arguments).code == 0


def test_a_file_size_limit(tiny: Path, tmp_path: Path) -> None:
    """A limit of the process, as batch systems set it."""
    arguments = [
        "prune",
        str(tiny / "base"),
        str(tmp_path / "out"),
        "--ratio",
        "0.25",
        "--text",
        str(tiny / "train.txt"),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "numprune.flows.cli", *arguments, "--samples", "4", "--sequence-length", "64"],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    refused(
        Answered(done.returncode, done.stdout, done.stderr),
        f"{tmp_path / 'out'}: File too large: more than ",
        "ulimit -f",
    )
    assert list(tmp_path.iterdir()) == []


def test_a_read_only_workspace(numprune: Command, disk: Path, finished: Path, tiny: Path) -> None:
    workspace = Path(shutil.copytree(finished, disk / "w"))
    (release,) = (finished / "releases").glob("tiny-*")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for asked in (workspace, disk / "new" / "w"):
        answered = numprune(*command(tiny / "recipe.toml", asked))
        assert answered.is_error
        assert "Read-only file system; choose a writable folder" in answered.err
        assert "Traceback" not in answered.err
    for arguments in (
        ["registry", "publish", release, "tiny", "--workspace", workspace],
        ["registry", "promote", "tiny", "--workspace", workspace],
        ["registry", "fetch", "tiny/1", disk / "out", "--workspace", workspace],
        ["prune", tiny / "base", disk / "out", "--ratio", "0.25", "--samples", "4", "--text", tiny / "train.txt"],
        ["export", tiny / "base", disk / "out", "--to", "onnx"],
    ):
        refused(numprune(*arguments), str(disk), "Read-only file system")


def test_a_workspace_that_is_a_file(numprune: Command, tiny: Path) -> None:
    answered = numprune("optimize", tiny / "recipe.toml", "--workspace", tiny / "train.txt", "--set", *QUICK)
    assert answered.code == 1
    assert f"--workspace: {tiny / 'train.txt'}: not a folder" in answered.err
