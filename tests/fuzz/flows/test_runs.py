from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from numprune.flows import clean, recipe, runs
from numprune.flows.stages import run_stage
from tests.flows.conftest import work
from tests.fuzz.strangers import NAMES, documents, fuzz, named

RUN = "20261121T120000Z-01234567"
GOOD: dict[str, Any] = {
    "schema": "numprune/run/1",
    "run": RUN,
    "name": "m",
    "recipe": "0" * 64,
    "source": "r.toml",
    "numprune": "0.1.0",
    "pid": 1,
    "started": "2026-11-21T12:00:00Z",
    "ended": None,
    "seconds": 1.5,
    "outcome": "pass",
    "error": None,
    "stages": [
        {
            "name": "prune",
            "folder": f"prune-{'0' * 16}",
            "digest": "0" * 64,
            "reused": True,
            "seconds": 1.0,
            "peak_memory_bytes": 1,
            "bytes": 1,
        }
    ],
    "report": "stages/x",
    "release": None,
    "version": None,
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("workspace")
    (made / "runs" / RUN).mkdir(parents=True)
    asked = recipe.load(recipe.EMBEDDED_RECIPE)
    with runs.recording(made, asked, recipe.EMBEDDED_RECIPE) as recording:
        run_stage(made, work(), recording.folder)
    return made


@fuzz
@given(documents(GOOD))
@example(b"[" * 100_000)
def test_a_record_is_read_or_reported_as_damaged(workspace: Path, content: bytes) -> None:
    (workspace / "runs" / RUN / "record.json").write_bytes(content)
    named(runs.read, workspace / "runs" / RUN)
    other, found = runs.list_runs(workspace)
    if other.run == RUN:
        other, found = found, other
    assert (found.record is None) == (found.state == "damaged")
    for run in (found, other):
        runs.log_tail(run, 5)


@fuzz
@given(st.sampled_from(NAMES) | st.text())
@example("20269999T999999Z-01234567")
def test_a_requested_run_id_is_never_a_path(workspace: Path, asked: str) -> None:
    named(runs.find, workspace, asked)


@fuzz
@given(st.lists(st.sampled_from([name for name in NAMES if "/" not in name and "\0" not in name][:20]), max_size=3))
def test_only_stage_folders_are_removed(workspace: Path, names: list[str]) -> None:
    made = []
    for name in names:
        try:
            (workspace / "stages" / name).mkdir()
            made.append(workspace / "stages" / name)
        except (OSError, UnicodeError):
            continue
    found = clean.look(workspace)
    assert [item for item in found.goes if item.kind != "run"] == []
    for path in made:
        path.rmdir()
