import io
import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from numprune.errors import InputError, IntegrityError
from numprune.flows import logs, recipe, runs
from numprune.flows.stages import StageResult, run_stage, sweep
from tests.flows.conftest import work

EMBEDDED = recipe.load(recipe.EMBEDDED_RECIPE)

# A run in a process of its own: one stage, and then it waits to be killed.
PROGRAM = """
    import sys, time
    from pathlib import Path
    from numprune.flows import recipe, runs
    from numprune.flows.stages import Stage, run_stage

    workspace = Path(sys.argv[1])
    asked = recipe.load(recipe.EMBEDDED_RECIPE)
    with runs.recording(workspace, asked, recipe.EMBEDDED_RECIPE) as recording:
        stage = Stage.of("work", "serving", lambda out: {})
        recording.add(run_stage(workspace, stage, recording.folder))
        print("ready", flush=True)
        time.sleep(600)
"""


def stage(workspace: Path, recording: runs.Recording, option: int = 1) -> StageResult[Any]:
    result = run_stage(workspace, work(option), recording.folder)
    recording.add(result)
    return result


def record(workspace: Path, **_: Any) -> runs.RecordedRun:
    """A passed run with one stage."""
    with runs.recording(workspace, EMBEDDED, recipe.EMBEDDED_RECIPE) as recording:
        made = stage(workspace, recording)
        recording.judged("pass", made.path, workspace / "releases" / "r", "name/1")
    return runs.find(workspace, recording.run)


def test_a_run_from_its_start_to_its_end(tmp_path: Path) -> None:
    with runs.recording(tmp_path, EMBEDDED, recipe.EMBEDDED_RECIPE) as recording:
        (begun,) = runs.list_runs(tmp_path)
        assert (begun.state, begun.alive) == ("running", True)
        assert begun.record is not None
        assert begun.record.stages == ()
        first = stage(tmp_path, recording)
        again = stage(tmp_path, recording)
        recording.judged("fail", first.path, None, None)
        assert runs.find(tmp_path, None).state == "running"
    (ended,) = runs.list_runs(tmp_path)
    assert (ended.state, ended.alive) == ("fail", False)
    found = ended.record
    assert found is not None
    assert (found.name, found.recipe, found.pid) == (EMBEDDED.registry.name, EMBEDDED.digest, os.getpid())
    assert [(one.folder, one.reused) for one in found.stages] == [(first.path.name, False), (again.path.name, True)]
    assert found.stages[0].digest == first.digest
    assert found.stages[0].bytes == (first.path / "result.json").stat().st_size
    assert found.stages[0].seconds > 0
    assert found.stages[0].peak_memory_bytes > 1 << 20
    assert (found.report, found.release) == (f"stages/{first.path.name}", None)
    assert found.seconds is not None
    assert found.seconds > 0
    assert runs.uses(ended) == {("stages", first.path.name)}


@pytest.mark.parametrize(
    ("error", "state"), [(ValueError("no such thing"), "error"), (KeyboardInterrupt(), "interrupted")]
)
def test_the_record_states_how_a_run_ended(tmp_path: Path, error: BaseException, state: str) -> None:
    def end() -> None:
        with runs.recording(tmp_path, EMBEDDED, recipe.EMBEDDED_RECIPE) as recording:
            recording.judged("pass", tmp_path / "stages" / "x", None, None)
            raise error

    with pytest.raises(type(error)):
        end()
    found = runs.find(tmp_path, None)
    assert found.state == state
    assert found.record is not None
    assert found.record.error == (str(error) or None)


def test_a_killed_run_is_listed_as_interrupted_with_what_it_used(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    assert runs.find(tmp_path, None).state == "running"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    found = runs.find(tmp_path, None)
    assert found.state == "interrupted"
    assert found.record is not None
    assert [one.name for one in found.record.stages] == ["work"]
    assert len(runs.uses(found)) == 1


def test_a_full_disk_at_the_end_does_not_change_the_outcome(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with runs.recording(tmp_path, EMBEDDED, recipe.EMBEDDED_RECIPE) as recording:
        (recording.folder / ".record.json.partial").mkdir()  # nothing can be written there
    assert "could not be completed" in caplog.text
    assert runs.find(tmp_path, None).state == "interrupted"


def test_runs_are_found_by_prefix_newest_first(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run was recorded"):
        runs.find(tmp_path, None)
    names = [record(tmp_path).run for _ in range(2)]
    assert [run.run for run in runs.list_runs(tmp_path)] == sorted(names, reverse=True)
    assert runs.find(tmp_path, min(names)).run == min(names)
    assert runs.find(tmp_path, None).run == max(names)
    with pytest.raises(InputError, match="ambiguous, 2 runs begin with it"):
        runs.find(tmp_path, "20")
    with pytest.raises(InputError, match="not found among the 2 runs"):
        runs.find(tmp_path, "1999")


def damaged(text: str, **changes: Any) -> str:
    return json.dumps({**json.loads(text), **changes})


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[:100],
        lambda text: "[" * 100_000,
        lambda text: damaged(text, run="20261121T000000Z-00000000"),
        lambda text: damaged(text, more=1),
        lambda text: damaged(text, outcome="splendid"),
        lambda text: damaged(text, stages=[{"folder": "../../etc"}]),
        lambda text: " " * (runs.MAXIMUM_BYTES + 1),
    ],
)
def test_a_damaged_record_is_reported_and_hides_no_other(tmp_path: Path, damage: Any) -> None:
    spoiled, whole = record(tmp_path), record(tmp_path)
    path = spoiled.folder / "record.json"
    path.write_text(damage(path.read_text()))
    states = {run.run: run.state for run in runs.list_runs(tmp_path)}
    assert states == {spoiled.run: "damaged", whole.run: "pass"}
    with pytest.raises(IntegrityError, match=r"record\.json"):
        runs.read(spoiled.folder)


def test_nothing_is_read_through_links(tmp_path: Path) -> None:
    run = record(tmp_path / "w")
    elsewhere = tmp_path / "elsewhere"
    (run.folder / "record.json").rename(elsewhere)
    (run.folder / "record.json").symlink_to(elsewhere)
    (run.folder / runs.LOG).unlink()
    (run.folder / runs.LOG).symlink_to(elsewhere)
    found = runs.find(tmp_path / "w", None)
    assert found.state == "damaged"
    assert runs.log_tail(found, 5) == []
    os.rename(run.folder, tmp_path / run.run)
    run.folder.symlink_to(tmp_path / run.run)
    assert runs.list_runs(tmp_path / "w") == []


def test_the_log_of_a_run_names_run_and_stage_and_excludes_other_runs(tmp_path: Path) -> None:
    logger = logging.getLogger("numprune.flows.test")
    handlers = list(logging.getLogger("numprune").handlers)  # Prefect may have added its own
    logger.info("before")
    with runs.recording(tmp_path, EMBEDDED, recipe.EMBEDDED_RECIPE) as recording:
        logger.info("first")
        with logs.within(stage="prune"):
            logger.warning("second\n%s", "\udcff")
        with logs.within(run="another"):
            logger.info("not ours")
    lines = [json.loads(line) for line in runs.log_tail(runs.find(tmp_path, None), 10)]
    assert [(line["message"], line["run"], line["stage"]) for line in lines] == [
        ("first", recording.run, None),
        ("second\n\udcff", recording.run, "prune"),
    ]
    assert logging.getLogger("numprune").handlers == handlers


def test_a_full_disk_for_the_log_does_not_end_a_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """/dev/full refuses every write, like a full disk."""
    (tmp_path / "log").symlink_to("/dev/full")
    stream = io.StringIO()
    with logs.to_stream("human", stream), logs.to_file(tmp_path / "log"):
        logging.getLogger("numprune.flows.test").info("said")
    assert stream.getvalue() == "said\n"
    assert "Traceback" not in capfd.readouterr().err


def test_only_the_end_of_a_long_log_is_read(tmp_path: Path) -> None:
    run = record(tmp_path)
    with (run.folder / runs.LOG).open("a") as file:
        file.write("\n".join(f"line {number}" for number in range(200_000)))
    assert runs.log_tail(run, 2) == ["line 199998", "line 199999"]


def test_a_run_killed_while_starting_leaves_no_record(tmp_path: Path) -> None:
    """There is no record until its folder is renamed into place."""
    program = """
        import os, signal, sys
        from pathlib import Path
        from numprune.export import temporary
        from numprune.flows import recipe, runs
        temporary.move = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        with runs.recording(Path(sys.argv[1]), recipe.load(recipe.EMBEDDED_RECIPE), recipe.EMBEDDED_RECIPE):
            pass
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program), str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert runs.list_runs(tmp_path) == []
    assert len(list((tmp_path / "runs").iterdir())) == 1
    sweep(tmp_path)
    assert list((tmp_path / "runs").iterdir()) == []
