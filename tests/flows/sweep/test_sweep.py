"""A sweep of a tiny model, with real runs: shared stages, interruptions, failures and the choice."""

import json
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest

from numprune.errors import EnvironmentInvalid
from numprune.export import locks
from numprune.flows import runs
from numprune.flows.recipe import load
from numprune.flows.run import Run
from numprune.flows.stages import Stage, StageResult
from numprune.flows.steps.prepare import prepare
from numprune.flows.sweep import choice
from numprune.flows.sweep import run as sweeping
from numprune.serving import report as reports
from tests.flows.conftest import Answered, shell, work
from tests.flows.faults import MEASURED, QUICK, driving, wait_until

R = TypeVar("R")
Command = Callable[..., Answered]

pytestmark = pytest.mark.slow

RATIOS = "prune.ratio=0.25,0.5"


def words(tiny: Path, workspace: Path, *options: str, grid: str = RATIOS) -> list[str]:
    options = ("--json", "--workspace", str(workspace), *options, "--set", *QUICK)
    return ["sweep", str(tiny / "recipe.toml"), "--grid", grid, *options]


def disturbed(found: dict[str, Any]) -> bool:
    return any(one["outcome"] == "invalid environment" for one in found["candidates"])


@pytest.fixture(scope="module")
def explored(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace in which a sweep was killed, and run again; not to be written to."""
    folder = tmp_path_factory.mktemp("sweep")
    argv = words(tiny, folder / "w", "--workers", "2", "--choose", "smallest")
    with driving(folder / "control") as driver:
        driver.run_until("prune", "rename", argv)
        family = psutil.Process(driver.process.pid).children(recursive=True)
        os.kill(driver.process.pid, signal.SIGKILL)
        driver.process.wait()
        psutil.wait_procs(family, timeout=30)
    with driving(folder / "again") as driver:
        for _ in range(3):
            driver.begin(argv)
            code, found = driver.answer()
            if not disturbed(found):
                break
        else:
            pytest.skip("nothing can be measured on this machine now")
    assert code == 0, driver.said()
    (folder / "found.json").write_text(json.dumps(found))
    return folder


def test_a_killed_sweep_goes_on_and_publishes_the_best_candidate(explored: Path) -> None:
    found = json.loads((explored / "found.json").read_text())
    assert [one["settings"] for one in found["candidates"]] == [{"prune.ratio": 0.25}, {"prune.ratio": 0.5}]
    assert [one["outcome"] for one in found["candidates"]] == ["pass", "pass"]
    assert (found["outcome"], found["chosen"], found["version"]) == ("pass", 2, "tiny/1")
    report = reports.read(Path(found["release"]) / "report.json")
    assert report.candidates == 2
    assert report.verdict is not None
    assert "one of 2 candidates, judged by 97.5 % bounds" in report.verdict.gates[0].reason
    published = load(Path(found["release"]) / "recipe.toml")
    assert published.prune.ratio == 0.5
    assert not list((explored / "w").rglob(".*.partial"))


def test_stages_that_candidates_share_are_made_once(explored: Path) -> None:
    recorded = [run.record for run in runs.list_runs(explored / "w") if run.record]
    made = [one for record in recorded for one in record.stages if not one.reused]
    # A measurement on a disturbed machine is repeated.
    assert set(Counter(one.folder for one in made if not one.folder.startswith(MEASURED)).values()) == {1}
    names = Counter(one.name for one in made)
    assert names["calibration"] == names["export onnx baseline"] == 1
    assert 1 <= names["prune"] <= names["quality"] == 2  # what was killed before its end is not recorded


def test_the_page_links_every_candidate_with_its_report(explored: Path) -> None:
    found = json.loads((explored / "found.json").read_text())
    page = Path(found["page"])
    text = page.read_text()
    for one in found["candidates"]:
        link = os.path.relpath(Path(one["report"]).with_name("report.html"), page.parent)
        assert (page.parent / link).is_file()
        assert text.count(f'href="{link}"') == 3  # in each chart and in the table
    assert "2 (chosen)" in text
    assert json.loads(page.with_suffix(".json").read_text()) == found
    assert "the smallest that passes is 2: published tiny/1" in page.with_suffix(".md").read_text()


def test_a_finished_sweep_reuses_everything_and_publishes_nothing_new(
    explored: Path, tiny: Path, tmp_path: Path, numprune: Command
) -> None:
    workspace = Path(shutil.copytree(explored / "w", tmp_path / "w"))
    argv = words(tiny, workspace, "--choose", "smallest")
    planned = numprune(*argv, "--dry-run").json
    assert (planned["missing"], planned["seconds"]) == (0, 0)
    assert "calibration" in planned["shared_by_all"]
    assert "prune" not in planned["shared_by_all"]
    again = numprune(*argv)
    found = json.loads((explored / "found.json").read_text())
    assert again.json["version"] == found["version"]
    assert [one["figures"] for one in again.json["candidates"]] == [one["figures"] for one in found["candidates"]]


def test_a_failed_candidate_is_a_row_and_a_refused_gate_a_result(
    explored: Path, tiny: Path, tmp_path: Path, numprune: Command
) -> None:
    workspace = Path(shutil.copytree(explored / "w", tmp_path / "w"))
    answered = numprune(*words(tiny, workspace, grid="data.samples=12,99999"))
    first, second = answered.json["candidates"]
    assert second["outcome"] == "error"
    assert "data.samples" in second["error"]
    assert second["figures"] is None
    page = Path(answered.json["page"])
    log = os.path.relpath(workspace / "runs" / second["run"] / "log.jsonl", page.parent)
    assert (page.parent / log).is_file()
    assert f'href="{log}"' in page.read_text()
    assert first["on_front"] == (first["outcome"] == "pass")  # unless the machine was too busy to measure
    assert (answered.code, answered.json["version"]) == (1, None)

    gate = 'gates=[{metric="sizes.parameters.ratio", bound="point", max=0.1}]'
    refused = numprune(*words(tiny, workspace, "--choose", "fastest", "--set", gate))
    assert (refused.code, refused.json["chosen"], refused.json["version"]) == (2, None, None)
    assert {one["outcome"] for one in refused.json["candidates"]} == {"fail"}


@pytest.mark.parametrize("workers", ["1", "2"])  # with one, a candidate has not begun
def test_an_interrupted_sweep_ends_its_stages_and_says_so(tiny: Path, tmp_path: Path, workers: str) -> None:
    with driving(tmp_path / "control") as driver:
        pid = driver.run_until("calibration", "rename", words(tiny, tmp_path / "w", "--workers", workers))
        driver.process.send_signal(signal.SIGINT)
        code, _ = driver.answer()
        assert code == 130
        wait_until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE, 30)
    assert {run.state for run in runs.list_runs(tmp_path / "w")} == {"interrupted"}
    assert not list((tmp_path / "w" / "stages").glob("calibration-*"))


def test_an_interrupt_ends_the_wait_for_another_sweep(tiny: Path, tmp_path: Path) -> None:
    """That of another process, which measures time."""
    workspace = tmp_path / "w"
    with driving(tmp_path / "control") as driver, sweeping._this_machine(workspace, "time", None):
        driver.begin(words(tiny, workspace))
        wait_until(lambda: {run.state for run in runs.list_runs(workspace)} == {"running"}, 60)
        driver.process.send_signal(signal.SIGINT)
        code, _ = driver.answer()
        assert code == 130
    assert {run.state for run in runs.list_runs(workspace)} == {"interrupted"}
    assert not list((workspace / "stages").glob("*"))


def test_a_machine_on_which_blocks_cannot_be_timed_is_no_error_of_the_candidate(tiny: Path, tmp_path: Path) -> None:
    def make(run: Run, stage: Stage[R]) -> StageResult[R]:
        raise EnvironmentInvalid("timings: the machine is busy")

    found = sweeping.explore(prepare(load(tiny / "recipe.toml"), tmp_path / "w"), tiny / "recipe.toml", make)
    assert (found.outcome, found.error, found.report) == ("invalid environment", "timings: the machine is busy", None)
    assert [found.run] == [one.run for one in runs.list_runs(tmp_path / "w")]
    assert choice.without_one(["error", found.outcome]) == "invalid environment"


def test_recipes_that_cannot_run_here_are_refused_before_any_work(
    tiny: Path, tmp_path: Path, numprune: Command
) -> None:
    answered = numprune(*words(tiny, tmp_path / "w", grid="prune.ratio=0.25,0.9999"))
    assert answered.is_error
    assert "prune.ratio=0.9999: the recipe cannot run here" in answered.err
    assert not (tmp_path / "w").exists()
    cluster = numprune(*words(tiny, tmp_path / "w", "--address", "tcp://127.0.0.1:8786"))
    assert cluster.is_error
    assert "threads have no cluster" in cluster.err


def test_nothing_else_works_while_time_is_measured(tiny: Path, tmp_path: Path) -> None:
    run = prepare(load(tiny / "recipe.toml"), tmp_path)
    other, timed = work(), work(2).timed()

    def is_free(workspace: Path, shared: bool) -> bool:
        (lock,) = (workspace / "sweeps").glob(".*-time.lock")
        try:
            with locks.held(lock, timeout_s=0, shared=shared):
                return True
        except locks.Held:
            return False

    seen = []

    def make(run: Run, stage: Stage[R]) -> StageResult[R]:
        seen.append((stage.measures_time, is_free(run.workspace, shared=True), is_free(run.workspace, shared=False)))
        return run.make(stage)

    for stage in (other, timed):
        sweeping._undisturbed(make, None, run, stage)
    assert seen == [(False, True, False), (True, False, False)]  # others may run beside it, but no measurement


# The same stages, but for their reports.
ALIKE = "quantize.group_size=32,64"


def test_a_sweep_on_dask_publishes_like_one_in_threads(tiny: Path, workspace: Path) -> None:
    """As a flow on a temporary server of Prefect, with candidates in processes of a local cluster."""
    pytest.importorskip("prefect_dask")
    argv = words(tiny, workspace, "--choose", "best-quality", "--runner", "dask", "--workers", "2", grid=ALIKE)
    answered = shell(*argv)
    assert answered.code == 0, answered.err
    found = answered.json
    assert [one["outcome"] for one in found["candidates"]] == ["pass", "pass"]
    assert found["candidates"][0]["figures"] == found["candidates"][1]["figures"]
    assert (found["chosen"], found["version"]) == (1, "tiny/2")  # judged anew, as one of two
    recorded = {run.run for run in runs.list_runs(workspace)}
    assert {one["run"] for one in found["candidates"]} < recorded


@pytest.mark.skipif(find_spec("prefect_ray") is not None, reason="the package is here")
def test_a_runner_without_its_package_is_refused(tiny: Path, tmp_path: Path, numprune: Command) -> None:
    answered = numprune(*words(tiny, tmp_path / "w", "--runner", "ray"))
    assert answered.is_error
    assert 'pip install "numprune[ray]"' in answered.err
    assert not (tmp_path / "w").exists()
