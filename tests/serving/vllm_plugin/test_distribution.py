"""The plug-in's distribution: small, without dependencies, and lazy."""

import configparser
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import numprune_vllm
import pytest

from numprune import serving

SOURCE = Path(serving.__file__).parent / "vllm_plugin"
ROOT = Path(__file__).parents[3]


def test_the_wheel_holds_the_package_and_the_entry_point(tmp_path):
    tree = shutil.copytree(SOURCE, tmp_path / "tree", ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path, tree]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("numprune_vllm-*.whl")
    assert wheel.name.split("-")[1] == numprune_vllm.__version__
    entry_points = configparser.ConfigParser()
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        (points,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        entry_points.read_string(archive.read(points).decode())
    assert sorted(names) == sorted(f"numprune_vllm/{file.name}" for file in SOURCE.glob("numprune_vllm/*.py"))
    assert dict(entry_points["vllm.general_plugins"]) == {"numprune": "numprune_vllm:register"}


def test_the_entry_point_imports_nothing_until_called():
    script = "import sys; before = set(sys.modules); import numprune_vllm; print(*set(sys.modules) - before)"
    done = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(SOURCE)!r}); {script}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["numprune_vllm"]


@pytest.mark.slow
def test_the_plugin_depends_only_on_what_vllm_installs():
    """numprune stands beside it without the rest."""
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    needed = {re.split(r"[^\w-]", line)[0].replace("-", "_") for line in requirements}
    of_vllm = {"torch", "transformers", "tokenizers", "huggingface_hub", "safetensors", "numpy", "tqdm", "pydantic"}
    # transformers imports scikit-learn where it is installed, and that needs scipy.
    absent = needed - of_vllm | {"sklearn"}
    assert "scipy" in absent
    script = (
        f"import sys; sys.modules |= dict.fromkeys({sorted(absent)!r}); "
        "import numprune_vllm.architectures, numprune_vllm.preflight, numprune_vllm.weights"
    )
    path = os.pathsep.join([str(SOURCE), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr
