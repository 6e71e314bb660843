"""kill -9 from outside in every stage, and two concurrent runs."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from numprune.export import manifest
from tests.flows.faults import (
    MEASURED,
    STAGES,
    Driver,
    command,
    digests,
    driving,
    finish,
    stage,
    wait_until,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workspace of killed runs: each resumes from what the earlier ones finished."""
    return tmp_path_factory.mktemp("victim") / "w"


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    with driving(tmp_path_factory.mktemp("driver") / "control") as found:
        yield found


@pytest.mark.parametrize(
    ("name", "point"), [(name, ("write", "rename")[number % 2]) for number, name in enumerate(STAGES)]
)
def test_a_stage_process_is_killed(driver: Driver, victim: Path, tiny: Path, name: str, point: str) -> None:
    pid = driver.run_until(name, point, command(tiny / "recipe.toml", victim))
    assert pid != driver.process.pid
    (half_made,) = (victim / "stages").glob(f".{name}-*.partial")
    os.kill(pid, signal.SIGKILL)
    code, _ = driver.answer()
    assert code == 1
    last = driver.said().strip().splitlines()[-1]
    assert "its process was ended by SIGKILL" in last
    assert "Traceback" not in driver.said()
    assert half_made.exists()  # for the next run to remove
    whole = [path for path in (victim / "stages").glob("[a-z]*") if not path.name.startswith(name)]
    assert {manifest.verify(path).kind for path in whole} <= {"stage"}
    assert {path.name.rpartition("-")[0] for path in whole} >= {*STAGES[: STAGES.index(name)]}
    assert not (victim / "registry" / "mlflow.db").exists()


def test_concurrent_runs_of_one_recipe(driver: Driver, workspace: Path, tiny: Path, tmp_path: Path) -> None:
    """The second run reaches a stage while the first is in the middle of it."""
    for folder in ("releases", "registry"):
        shutil.rmtree(workspace / folder)
    for name in ("calibration", "prune", "reference-answers", *MEASURED):
        shutil.rmtree(stage(workspace, name))
    argv = command(tiny / "recipe.toml", workspace)
    with driving(tmp_path / "control") as other:
        driver.run_until("prune", "rename", argv)
        other.begin(argv)
        wait_until(lambda: "another run is computing it; waiting" in other.said())
        driver.let_go()
        found = [one.answer() for one in (driver, other)]
    if [code for code, _ in found] == [4, 4]:
        pytest.skip("nothing can be measured on this machine now")
    assert [code for code, _ in found] == [0, 0], other.said()
    one, two = (answer for _, answer in found)
    assert (one["release"], one["version"]) == (two["release"], "tiny/1")
    assert two["version"] == "tiny/1"
    for name in ("calibration", "prune", "reference-answers", "benchmark onnxruntime", "report"):
        made = [stage["reused"] for answer in (one, two) for stage in answer["stages"] if stage["name"] == name]
        assert sorted(made) == [False, True]
    assert len(list((workspace / "releases").glob("[a-z]*"))) == 1
    assert not list(workspace.rglob(".*.partial"))


def test_the_run_itself_is_killed_and_the_next_one_is_unaffected(
    driver: Driver, victim: Path, finished: Path, tiny: Path
) -> None:
    """While it assembles the release, which happens in the main process."""
    pid = driver.run_until("tiny", "rename", command(tiny / "recipe.toml", victim))
    assert pid == driver.process.pid
    family = psutil.Process(pid).children(recursive=True)
    os.kill(pid, signal.SIGKILL)
    driver.process.wait()
    _, alive = psutil.wait_procs(family, timeout=30)
    assert alive == []
    assert list((victim / "releases").glob(".*.partial"))

    found = finish(tiny / "recipe.toml", victim)
    assert found["version"] == "tiny/1"
    assert all(stage["reused"] for stage in found["stages"])
    assert digests(victim) == digests(finished)
    assert not list(victim.rglob(".*.partial"))
    assert manifest.verify(Path(found["release"])).kind == "release"
