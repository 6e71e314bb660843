"""What a registry keeps in a workspace, looked at and damaged from outside."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from numprune.serving.registry import Version

NAME = "tiny-llama"
WEIGHTS = "checkpoint/model.safetensors"

MakeRelease = Callable[..., Path]


def stored(workspace: Path, version: Version) -> Path:
    """Where the workspace's registry keeps the files of a version."""
    return workspace / "registry" / "artifacts" / version.run_id / "artifacts" / "release"


def artifact_folders(workspace: Path) -> list[str]:
    artifacts = workspace / "registry" / "artifacts"
    return sorted(os.listdir(artifacts)) if artifacts.exists() else []


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def run_child(script: str, *arguments: object) -> subprocess.Popen[str]:
    """A process of its own that runs `script` with the registry at hand."""
    head = "import os, signal, sys\nfrom pathlib import Path\nfrom numprune.serving import registry as registries\n"
    return subprocess.Popen(
        [sys.executable, "-c", head + script, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
