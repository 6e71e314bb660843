"""Registry commands killed at any step, and several of them at once."""

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from numprune.errors import InputError
from numprune.export import manifest
from numprune.serving import registry as registries
from numprune.serving.registry import Registry, publishing
from tests.serving.team import Actors
from tests.serving.workspaces import NAME, MakeRelease, artifact_folders, contents, run_child, stored

# --- what a kill leaves ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def actors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Actors]:
    forking = Actors(tmp_path_factory.mktemp("actors"))
    yield forking
    forking.close()


def spread(steps: int, times: int) -> list[int]:
    """So many of the steps, of which there are more than there is time for; with the first and the last."""
    assert steps > times
    return [round(share * (steps - 1) / (times - 1)) for share in range(times)]


class Killed:
    """A command on copies of one workspace, killed between its steps: see `actor.act`."""

    def __init__(
        self,
        actors: Actors,
        workspace: Path,
        do: str,
        *arguments: object,
        points: Callable[[Sequence[str]], Sequence[int]] = lambda steps: spread(len(steps), 5),
        forget: Callable[[], object] = lambda: None,
    ) -> None:
        self._actors, self._workspace, self._do, self._arguments = actors, workspace, do, arguments
        self._points = points
        self._forget = forget

    def everywhere(self) -> Iterator[tuple[int, Path, Registry]]:
        """After each kill: its step, the workspace and the registry in it, as they were left."""
        whole = self._copy("whole")
        steps = self.again(whole)["steps"]
        shutil.rmtree(whole)
        self._forget()
        for step in self._points(steps):
            copy = self._copy(str(step))
            ended = self._actors.run(self._do, *self._arguments, workspace=copy, die_at=step)
            assert ended.code == -signal.SIGKILL, ended
            yield step, copy, registries.open_registry(None, copy)
            shutil.rmtree(copy)

    def again(self, workspace: Path) -> Any:
        ended = self._actors.run(self._do, *self._arguments, workspace=workspace)
        assert ended.code == 0, ended
        return ended.said

    def _copy(self, name: str) -> Path:
        return shutil.copytree(self._workspace, self._workspace.with_name(f"{name} {self._do}"))


def changes_of_a_publication(steps: Sequence[str]) -> list[int]:
    """The first step; amid the files, and with all there; before the version, its commit, the end of its run, and the
    alias; the last step.
    """
    copies, renames = (
        [step for step, what in enumerate(steps) if what == name] for name in ("shutil.copyfile", "os.rename")
    )
    version, ended, alias = (
        next(step for step, what in enumerate(steps) if what.startswith(change))
        for change in ("INSERT INTO model_versions", "UPDATE runs SET status", "UPDATE registered_model_aliases")
    )
    commit = steps.index("COMMIT", version)
    return [0, copies[2], renames[-1], version, commit, ended, alias, len(steps) - 1]


@pytest.mark.slow
def test_a_publisher_killed_at_any_step_leaves_nothing_half_made(
    actors: Actors, registry: Registry, workspace: Path, make_release: MakeRelease
) -> None:
    first, second = make_release("a"), make_release("b")
    registries.publish(registry, first, NAME)
    registries.promote(registry, NAME)
    killed = Killed(actors, workspace, "publish", second, NAME, points=changes_of_a_publication)
    seen = []
    for step, copy, left in killed.everywhere():
        versions = [registries.verify(left, version.reference) for version in registries.list_versions(left, NAME)]
        seen.append(len(versions))
        assert registries.verify(left, NAME).version == 1  # production
        assert registries.verify(left, f"{NAME}@candidate").version in (1, 2)
        version = registries.publish(left, second, NAME)
        assert (version.version, version.aliases) == (2, ("candidate",)), step
        assert registries.verify(left, version.reference).digest == manifest.read(second).digest
        assert [version.version for version in registries.list_versions(left, NAME)] == [1, 2]
        assert len(artifact_folders(copy)) == 2
        assert contents(stored(copy, version)) == contents(second)
        runs = left.client.search_runs([left.experiment])
        assert [run.info.status for run in runs] == ["FINISHED", "FINISHED"]
    assert seen == [1] * 5 + [2] * 3  # the version counts once it is committed, for it is whole


@pytest.mark.parametrize(("do", "before", "then"), [("promote", 1, 2), ("rollback", 2, 1)])
@pytest.mark.slow
def test_promotion_is_atomic_when_killed_at_any_step(
    actors: Actors, registry: Registry, workspace: Path, make_release: MakeRelease, do: str, before: int, then: int
) -> None:
    for content in "ab":
        registries.publish(registry, make_release(content), NAME)
    registries.promote(registry, f"{NAME}/1")
    if do == "rollback":
        registries.promote(registry, NAME)
    killed = Killed(actors, workspace, do, NAME)
    seen = []
    for _, _copy, left in killed.everywhere():
        seen.append(registries.verify(left, NAME).version)
        if do == "promote":
            assert registries.promote(left, NAME).version == then
            assert registries.rollback(left, NAME).version == before  # the history is whole
        elif seen[-1] == before:
            assert registries.rollback(left, NAME).version == then
        with pytest.raises(InputError, match="no version was in production before tiny-llama/1"):
            registries.rollback(left, NAME)
    assert set(seen) == {before, then}
    assert seen == sorted(seen, key=[before, then].index)  # from one step on, and never back


@pytest.mark.slow
def test_a_fetch_killed_at_any_step_leaves_no_folder_of_that_name(
    actors: Actors, registry: Registry, workspace: Path, make_release: MakeRelease, tmp_path: Path
) -> None:
    release = make_release()
    registries.publish(registry, release, NAME)
    out = tmp_path / "fetched" / "out"
    killed = Killed(actors, workspace, "fetch", f"{NAME}@candidate", out, forget=lambda: shutil.rmtree(out))
    out.parent.mkdir()
    for _, _copy, left in killed.everywhere():
        if out.exists():  # killed after the last change but one: what is left is swept by the next fetch to this place
            manifest.sweep(out.parent)
        else:
            registries.fetch(left, f"{NAME}@candidate", out)
        assert contents(out) == contents(release)
        assert os.listdir(out.parent) == ["out"]
        shutil.rmtree(out)


def test_orphans_on_a_server_are_removed_only_when_their_publisher_is_dead() -> None:
    host, pid, started = publishing._this_process().split(" ")
    assert not publishing._is_dead(f"{host} {pid} {started}")
    assert publishing._is_dead(f"{host} {pid} 1.00")  # the id was given to another process
    with subprocess.Popen(["true"]) as ended:
        ended.wait()
    assert not psutil.pid_exists(ended.pid)
    assert publishing._is_dead(f"{host} {ended.pid} {started}")
    assert not publishing._is_dead(f"elsewhere {ended.pid} {started}")
    assert not publishing._is_dead("")


# --- several at once -------------------------------------------------------------------------------

PUBLISH_ALL = """
registry = registries.open_registry(None, Path(sys.argv[1]))
for release in sys.argv[2:]:
    print(registries.publish(registry, Path(release), "tiny-llama").version)
"""


@pytest.mark.slow
def test_concurrent_publishers_create_the_registry_once(tmp_path: Path, make_release: MakeRelease) -> None:
    workspace = tmp_path / "neu angelegt"
    shared, left, right = make_release("shared"), make_release("left"), make_release("right")
    children = [run_child(PUBLISH_ALL, workspace, shared, own) for own in (left, right)]
    outputs = [child.communicate(timeout=300) for child in children]
    assert [(child.returncode, errors) for child, (_, errors) in zip(children, outputs, strict=True)] == [(0, "")] * 2
    assert [output.split()[0] for output, _ in outputs] == ["1", "1"]  # the same release, whoever came first
    registry = registries.open_registry(None, workspace)
    versions = registries.list_versions(registry, NAME)
    assert [version.version for version in versions] == [1, 2, 3]
    assert {version.digest for version in versions} == {manifest.read(path).digest for path in (shared, left, right)}
    assert [version.version for version in versions if version.aliases] == [3]
    assert sorted(version.run_id for version in versions) == artifact_folders(workspace)
    assert sorted(os.listdir(workspace / "registry")) == ["artifacts", "lock", "mlflow.db"]


@pytest.mark.slow
def test_concurrent_promotion_and_rollback_are_serialized(
    actors: Actors, registry: Registry, workspace: Path, make_release: MakeRelease
) -> None:
    for content in "abc":
        registries.publish(registry, make_release(content), NAME)
        registries.promote(registry, NAME)
    at_work = [actors.start(do, NAME, workspace=workspace) for do in ("rollback", "promote", "rollback", "promote")]
    ended = [actor.wait() for actor in at_work]
    assert [one.code for one in ended] == [0] * 4, ended
    registries.promote(registry, f"{NAME}/3")
    while registries.verify(registry, NAME).version != 1:  # the history leads back to the first, whoever came first
        registries.rollback(registry, NAME)
    with pytest.raises(InputError, match="no version was in production before"):
        registries.rollback(registry, NAME)


@pytest.mark.slow
def test_a_registry_killed_during_creation_is_created_again(tmp_path: Path, make_release: MakeRelease) -> None:
    script = """
import mlflow.store.db.utils as tables
upgrade = tables._upgrade_db
tables._upgrade_db = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
registries.open_registry(None, Path(sys.argv[1]))
"""
    child = run_child(script, tmp_path / "w")
    assert child.wait(120) == -signal.SIGKILL, child.communicate()
    assert [name for name in os.listdir(tmp_path / "w" / "registry") if name.endswith(".partial")]
    registry = registries.open_registry(None, tmp_path / "w")
    assert registries.publish(registry, make_release(), NAME).version == 1
    assert not [name for name in os.listdir(tmp_path / "w" / "registry") if "partial" in name]
