"""Plans refined by search: from the command line and a recipe, in reports, and killed midway."""

import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from numprune.flows import forecast
from numprune.plans import PLAN_FILE, read_plan
from numprune.serving.report.models.run import Refinement
from tests.flows.conftest import Answered

Command = Callable[..., Answered]

HOW = ("--ratio", 0.45, "--samples", 20, "--sequence-length", 32, "--align", 2)
SEARCHED = (*HOW, "--allocation", "error", "--refine", "search")


@pytest.fixture
def prune(numprune: Command, tiny: Path) -> Command:
    def run(*arguments: Any) -> Answered:
        return numprune("prune", tiny / "base", *arguments, "--text", tiny / "train.txt")

    return run


def test_the_command_says_what_the_search_found(prune: Command, numprune: Command, tmp_path: Path) -> None:
    planned = prune(tmp_path / "plan.json", *SEARCHED, "--plan-only", "--json")
    assert planned.code == 0, planned.err
    made = prune(tmp_path / "out", *SEARCHED)
    assert made.code == 0, made.err
    record = read_plan(tmp_path / "out" / PLAN_FILE).refinement
    assert record is not None
    assert planned.json["refinement"] == record.model_dump()
    assert made.out.splitlines()[-1] == str(record)
    assert re.match(r"search: \d+ generations, \d+ candidates, until ", str(record))
    assert record.rows == 10
    assert Refinement(**record.model_dump(), summary=str(record)).confirmed == record.confirmed  # as in a report
    inspected = numprune("inspect", tmp_path / "out")
    assert f"sizes refined by {record}" in " ".join(inspected.out.split())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            ("--allocation", "uniform"),
            "refine: the search starts from the sizes of allocation error; allocation is 'un",
        ),
        (("--samples", 8), "8 rows are too few, use at least 16"),
        (("--stream",), "which streaming avoids; use one or the other"),
        (("--refine", "none", "--refine-minutes", 5), "refine_minutes is 5; it has an effect only with refine search"),
        (("--refine-minutes", "nan"), "refine_minutes is nan; it must be more than 0"),
    ],
)
def test_requests_without_sense_are_refused(prune: Command, tmp_path: Path, change: Any, said: str) -> None:
    answered = prune(tmp_path / "out", *SEARCHED, *change)
    assert answered.code == 1
    assert said in answered.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ((), "prune: refine: the search starts from the sizes of allocation error"),
        (("prune.allocation=error", "data.samples=12"), "prune: refine: search compares plans on one half"),
        (("prune.allocation=error", "prune.stream=true"), "prune: refine: search runs the model many times"),
        (("prune.allocation=error", "learn.method=vib"), "prune: refine: a plan or trained masks choose the sizes"),
    ],
)
def test_recipes_without_sense_are_refused(
    numprune: Command, tiny: Path, tmp_path: Path, changes: Any, said: str
) -> None:
    words = [word for change in ("prune.refine=search", "data.samples=20", *changes) for word in ("--set", change)]
    answered = numprune("plan", tiny / "recipe.toml", "--workspace", tmp_path / "w", *words)
    assert answered.code == 1
    assert said in answered.err


def test_the_forecast_names_time_and_memory(numprune: Command, tiny: Path, tmp_path: Path) -> None:
    changes = ("prune.refine=search", "prune.allocation=error", "prune.refine_minutes=7", "data.samples=20")
    words = [word for change in changes for word in ("--set", change)]
    answered = numprune("plan", tiny / "recipe.toml", "--workspace", tmp_path / "w", *words, "--json")
    assert answered.code == 0, answered.err
    assert answered.json["refine_minutes"] == 7
    assert answered.json["memory"]["refining"] == 2 * 8 * (64**2 + 96**2)
    assert "refining sizes takes at most about 7 minutes, and needs at least 0 MiB more" in forecast.text(answered.json)


_KILLED = """
import os, signal, sys
from numprune.flows.cli import main
from numprune.progress import Progress

update = Progress.update

def killed(bar, count=1, note=""):
    update(bar, count, note)
    if bar._title == "search" and bar._done == 2:
        os.kill(os.getpid(), signal.SIGKILL)

Progress.update = killed
main(sys.argv[1:])
"""


def test_a_killed_search_starts_again_and_ends_like_an_undisturbed_one(
    prune: Command, tiny: Path, tmp_path: Path
) -> None:
    undisturbed = prune(tmp_path / "undisturbed", *SEARCHED, "--json")
    folder = tmp_path / "folder"
    words = [str(word) for word in ("prune", tiny / "base", folder / "out", *SEARCHED, "--text", tiny / "train.txt")]
    ended = subprocess.run([sys.executable, "-c", _KILLED, *words], capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert not (folder / "out").exists()
    again = prune(folder / "out", *SEARCHED, "--json")
    assert again.code == 0, again.err
    assert again.json["digest"] == undisturbed.json["digest"]
    assert [path.name for path in folder.iterdir()] == ["out"]
