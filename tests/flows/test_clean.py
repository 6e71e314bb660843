"""What is deleted and what is kept: real runs, real registries, and processes that are really killed."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from numprune.errors import InputError
from numprune.export import locks, manifest, temporary
from numprune.flows import clean, recipe, runs
from numprune.flows.names import TIMINGS, TRAINING, TRAINING_LOCK
from numprune.flows.stages import Stage, exclusive, run_stage
from numprune.serving import registry
from numprune.serving.registry.versions import MARK, RELEASE
from tests.flows.conftest import Answered
from tests.serving.servers import answering

EMBEDDED = recipe.load(recipe.EMBEDDED_RECIPE)
Command = Callable[..., Answered]


def record(workspace: Path, *options: int) -> runs.RecordedRun:
    """A finished run with a stage for each option."""
    with runs.recording(workspace, EMBEDDED, recipe.EMBEDDED_RECIPE) as recording:
        for option in options:
            make(workspace, option, recording.folder)
    return runs.find(workspace, recording.run)


def make(workspace: Path, option: int, used_by: Path | None = None) -> Path:
    def body(out: Path, *, option: int) -> dict[str, int]:
        (out / "deep").mkdir()
        (out / "deep" / "data.bin").write_bytes(bytes(1000))
        return {}

    return run_stage(workspace, Stage.of("work", "serving", body, option=option), used_by).path


def release(workspace: Path, content: str, uri: str = "workspace") -> Path:
    folder = workspace / "releases" / f"model-{content * 16}"
    with manifest.creating(folder, kind="release") as out:
        (out / "content").write_text(content)
        text = recipe.load(recipe.EMBEDDED_RECIPE, [f"registry.uri={uri}"]).to_toml()
        (out / "recipe.toml").write_text(text)
    return folder


def start(program: str, *arguments: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def stages(workspace: Path) -> set[str]:
    return {path.name for path in (workspace / "stages").iterdir() if path.name != ".locks"}


def test_only_unused_data_is_removed_and_only_with_yes(numprune: Command, tmp_path: Path) -> None:
    run = record(tmp_path, 1, 2)
    unused = make(tmp_path, 3)
    (tmp_path / "stages" / "notes.txt").write_text("mine")
    told = numprune("runs", "clean", "--workspace", tmp_path, "--json").json
    assert [(item["kind"], item["path"]) for item in told["goes"]] == [("stage", str(unused))]
    assert (told["done"], told["removed"]) == (False, [])
    assert told["bytes"] == clean.size(unused) > 1000
    assert unused.exists()
    assert "with --yes" in numprune("runs", "clean", "--workspace", tmp_path).out

    done = numprune("runs", "clean", "--workspace", tmp_path, "--yes", "--json").json
    assert (done["removed"], done["freed_bytes"]) == ([str(unused)], told["bytes"])
    assert not unused.exists()
    assert {("stages", name) for name in stages(tmp_path) - {"notes.txt"}} == runs.uses(run)
    assert numprune("runs", "clean", "--workspace", tmp_path).out == "nothing to remove\n"


def test_runs_are_forgotten_by_number_and_age(tmp_path: Path) -> None:
    old, new = record(tmp_path, 1), record(tmp_path, 2)
    (tmp_path / "runs" / old.run).rename(tmp_path / "runs" / "20200101T000000Z-00000000")

    def names(found: clean.Found) -> list[str]:
        return [item.path.name for item in found.goes if item.kind == "run"]

    assert names(clean.look(tmp_path)) == []
    assert names(clean.look(tmp_path, keep=1)) == ["20200101T000000Z-00000000"]
    assert names(clean.look(tmp_path, older_than=timedelta(days=1))) == ["20200101T000000Z-00000000"]
    assert names(clean.look(tmp_path, keep=2, older_than=timedelta(days=1))) == []
    found = clean.look(tmp_path, keep=0)
    assert names(found) == [new.run, "20200101T000000Z-00000000"]
    went, busy = clean.remove(tmp_path, found)
    assert ({item.kind for item in went}, busy) == ({"run", "stage"}, [])
    assert stages(tmp_path) == set()
    assert runs.list_runs(tmp_path) == []


def test_an_active_run_keeps_everything(tmp_path: Path) -> None:
    with runs.recording(tmp_path, EMBEDDED, recipe.EMBEDDED_RECIPE) as recording:
        used = make(tmp_path, 1, recording.folder)
        assert clean.look(tmp_path, keep=0).goes == []
        unused = make(tmp_path, 2)
        found = clean.look(tmp_path, keep=0)
        make(tmp_path, 2, recording.folder)  # between the look and the removal
        went, busy = clean.remove(tmp_path, found)
        assert (went, [item.path for item in busy]) == ([], [unused])
        wanted = make(tmp_path, 3)
        found = clean.look(tmp_path)
        with exclusive(wanted):  # being verified, by a run that has not marked it yet
            went, busy = clean.remove(tmp_path, found)
            assert (went, [item.path for item in busy]) == ([], [wanted])
    assert {used.name, unused.name, wanted.name} == stages(tmp_path)


def test_links_are_not_followed(tmp_path: Path) -> None:
    workspace, mine = tmp_path / "w", tmp_path / "mine"
    record(workspace, 1)
    mine.mkdir()
    (mine / "data").write_text("mine")
    unused = make(workspace, 2)
    (unused / "link").symlink_to(mine)
    (workspace / "stages" / f"work-{'0' * 16}").symlink_to(mine)
    went, _ = clean.remove(workspace, clean.look(workspace))
    assert [item.path for item in went] == [unused]
    assert (mine / "data").exists()
    (workspace / "stages").rename(tmp_path / "elsewhere")
    (workspace / "stages").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="stages: a link"):
        clean.look(workspace)


def test_a_folder_without_recorded_runs_is_left_alone(numprune: Command, tmp_path: Path) -> None:
    unused = make(tmp_path, 1)
    answered = numprune("runs", "clean", "--workspace", tmp_path, "--yes")
    assert (answered.code, answered.out) == (1, "")
    assert "no run was recorded here" in answered.err
    assert unused.exists()


def test_published_releases_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    record(tmp_path, 1)
    published, unpublished = release(tmp_path, "a"), release(tmp_path, "b")
    unknown = release(tmp_path, "c", uri="http://127.0.0.1:9")
    damaged = release(tmp_path, "d")
    (damaged / manifest.FILE_NAME).write_text("{}")
    opened = registry.open_registry(None, tmp_path)
    opened.client.create_registered_model("model", tags={MARK: "1"})
    tags = {RELEASE: manifest.read(published).digest}
    opened.client.create_model_version("model", source="file:///nowhere", run_id="0" * 32, tags=tags)

    found = clean.look(tmp_path)
    assert [item.path for item in found.goes] == [unpublished]
    whys = {item.path: item.why for item in found.stays}
    assert whys[published] == "published"
    assert "cannot tell whether it was published: registry http://127.0.0.1:9" in whys[unknown]
    assert "cannot tell whether it was published" in whys[damaged]
    before = sorted((tmp_path / "registry").rglob("*"))
    assert [item.path for item in clean.remove(tmp_path, found)[0]] == [unpublished]
    assert sorted((tmp_path / "registry").rglob("*")) == before
    assert published.exists()


def test_a_published_release_is_kept_even_if_the_registry_lists_are_incomplete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow servers before 2.21 answer every search for models with an empty list."""
    record(tmp_path, 1)
    published, name = release(tmp_path, "a"), EMBEDDED.registry.name
    opened = registry.open_registry(None, tmp_path)
    opened.client.create_registered_model(name, tags={MARK: "1"})
    tags = {RELEASE: manifest.read(published).digest}
    opened.client.create_model_version(name, source="file:///nowhere", run_id="0" * 32, tags=tags)
    opened.client.set_registered_model_alias(name, "candidate", "1")
    opened.client.create_model_version(name, source="file:///somebody-elses")
    opened.client.set_registered_model_alias(name, "theirs", "2")

    def stays() -> str:
        found = clean.look(tmp_path)
        assert found.goes == []
        return next(item.why for item in found.stays if item.path == published)

    assert stays() == "published"
    for search, lacks in (
        ("search_registered_models", f"has the model {name}, but does not list it"),
        ("search_model_versions", f"has the version {name}/1 (candidate), but does not list it"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(type(opened.client), search, lambda *_, **__: [])
            assert lacks in stays()
    with answering({"/version": (200, "2.20.4")}) as old:
        unknown = release(tmp_path, "b", uri=old)
        why = next(item.why for item in clean.look(tmp_path).stays if item.path == unknown)
        assert f"cannot tell whether it was published: registry {old}: MLflow 2.20.4 is not supported" in why


def test_a_clean_killed_during_a_removal(tmp_path: Path) -> None:
    """The stage is renamed before its first file is deleted, and the next clean finishes."""
    record(tmp_path, 1)
    unused = make(tmp_path, 2)
    program = """
        import os, signal, shutil, sys
        from pathlib import Path
        from numprune.flows import clean

        def half(folder, **_):
            (Path(folder) / "manifest.json").unlink()
            os.kill(os.getpid(), signal.SIGKILL)

        shutil.rmtree = half
        workspace = Path(sys.argv[1])
        clean.remove(workspace, clean.look(workspace))
    """
    process = start(program, tmp_path)
    assert process.wait() == -signal.SIGKILL
    assert not unused.exists()
    (left,) = temporary.abandoned(tmp_path / "stages")
    found = clean.look(tmp_path)
    assert [(item.kind, item.path) for item in found.goes] == [("temporary", left)]
    assert make(tmp_path, 2) == unused  # made again meanwhile
    assert [item.path for item in clean.remove(tmp_path, found)[0]] == [left]
    manifest.verify(unused)


def test_concurrent_cleans(tmp_path: Path) -> None:
    record(tmp_path, 0)
    for option in range(1, 40):
        make(tmp_path, option)
    command = [sys.executable, "-m", "numprune.flows.cli", "runs", "clean", "--yes", "--json"]
    command += ["--workspace", str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = [json.loads(process.communicate(timeout=60)[0]) for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert all(answer["busy"] == [] for answer in answers)
    assert len(stages(tmp_path)) == 1
    assert not list((tmp_path / "stages").glob("*.partial"))


def test_a_clean_beside_a_run_that_reuses_stages(tmp_path: Path) -> None:
    """All inputs of a run exist until it ends, however often a clean runs meanwhile."""
    record(tmp_path, 0)
    program = """
        import sys
        from pathlib import Path
        from numprune.export import manifest
        from numprune.flows import recipe, runs
        from tests.flows.test_clean import EMBEDDED, make

        workspace, number = Path(sys.argv[1]), int(sys.argv[2])
        with runs.recording(workspace, EMBEDDED, recipe.EMBEDDED_RECIPE) as recording:
            for option in range(number):
                make(workspace, option)  # unused for a moment
                path = make(workspace, option, recording.folder)
                manifest.verify(path)
                print(path, flush=True)
            print("done", flush=True)
            sys.stdin.read()
    """
    number = 12
    told = tmp_path / "told"
    with told.open("w") as file:
        command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path), str(number)]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=file, text=True, env=environment)
    deadline = time.monotonic() + 300
    while not told.read_text().endswith("done\n") and process.poll() is None:
        assert time.monotonic() < deadline
        clean.remove(tmp_path, clean.look(tmp_path))
    clean.remove(tmp_path, clean.look(tmp_path))
    paths = told.read_text().split()
    assert (len(paths), paths[-1]) == (number + 1, "done")
    for path in paths[:-1]:
        manifest.verify(Path(path))
    process.communicate("")
    assert process.returncode == 0


def test_listing_and_showing(numprune: Command, tmp_path: Path) -> None:
    assert "no run was recorded" in numprune("runs", "list", "--workspace", tmp_path / "none").out
    run = record(tmp_path, 1)
    (tmp_path / "runs" / "20200101T000000Z-00000000").mkdir()
    listed = numprune("runs", "list", "--workspace", tmp_path, "--json").json
    assert [(one["run"], one["state"]) for one in listed["runs"]] == [
        (run.run, "interrupted"),
        ("20200101T000000Z-00000000", "damaged"),
    ]
    assert listed["disk"]["stages"] == clean.size(tmp_path / "stages")
    assert re.match(rf"{run.run}  .* UTC  interrupted", numprune("runs", "list", "--workspace", tmp_path).out)
    shown = numprune("runs", "show", "2020", "--workspace", tmp_path)
    assert "record.json: cannot be read" in shown.out
    assert numprune("runs", "show", run.run[:15], "--workspace", tmp_path, "--json").json["folder"] == str(run.folder)


@pytest.mark.parametrize("words", [["--older-than", "soon"], ["--keep", "-1"], ["--older-than", "30"]])
def test_invalid_arguments_are_refused(numprune: Command, words: list[str]) -> None:
    answered = numprune("runs", "clean", *words)
    assert answered.code == 1
    assert words[0] in answered.err


@pytest.mark.parametrize("kind", [TRAINING, TIMINGS])
def test_interrupted_trainings_and_measurements(tmp_path: Path, kind: str) -> None:
    """Their state is removed unless a process holds it."""
    record(tmp_path, 0)
    dead, alive = (tmp_path / "stages" / f"{kind}{name}" for name in ("dead", "alive"))
    for folder in (dead, alive):
        folder.mkdir(parents=True)
        (folder / "state.json").write_text("{}")
        (folder / TRAINING_LOCK).touch()
    with locks.held(alive / TRAINING_LOCK):
        found = clean.look(tmp_path)
        assert [(item.kind, item.path) for item in found.goes] == [("training", dead)]
        assert clean.remove(tmp_path, found)[0] == found.goes
        assert not dead.exists()
    found = clean.look(tmp_path)
    with locks.held(alive / TRAINING_LOCK):  # resumed meanwhile
        assert clean.remove(tmp_path, found) == ([], found.goes)
    assert alive.exists()
