"""The registry on MLflow's real store: releases are complete, passed and published once, and fetched unchanged."""

import dataclasses
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from numprune.errors import InputError, IntegrityError
from numprune.export import manifest
from numprune.serving import registry as registries
from numprune.serving.gates import Gate, Policy, judge
from numprune.serving.registry import RefusedReleaseError, Registry, RegistryError, connection, publishing
from numprune.serving.registry.artifacts import ServerArtifacts
from numprune.serving.registry.versions import RELEASE, VERDICT
from numprune.serving.report import Report, markdown, write
from tests.serving.servers import answering, storing
from tests.serving.team import Actors

Json = dict[str, Any]
NAME = "tiny-llama"
WEIGHTS = "checkpoint/model.safetensors"


# --- what the tests work on ------------------------------------------------------------------------


@pytest.fixture(scope="session")
def _empty_registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow takes seconds to make its tables: once a session, then a copy for each test."""
    workspace = tmp_path_factory.mktemp("template")
    registries.open_registry(None, workspace)
    return workspace / "registry"


@pytest.fixture
def workspace(_empty_registry: Path, tmp_path: Path) -> Path:
    """With a space and letters beyond ASCII in its path."""
    folder = tmp_path / "wörk späce 作業"
    shutil.copytree(_empty_registry, folder / "registry")
    return folder


@pytest.fixture
def registry(workspace: Path) -> Registry:
    return registries.open_registry(None, workspace)


MakeRelease = Callable[..., Path]


@pytest.fixture
def make_release(tmp_path: Path, report_json: Json) -> MakeRelease:
    """`make_release("a")` writes the folder of a release; its content follows from its name."""

    def make(
        content: str = "a", *, limit: float = 0.8, change: Callable[[Path], object] = lambda _: None, **report: Any
    ) -> Path:
        parts = tmp_path / f"parts {content} {len(list(tmp_path.iterdir()))}"
        with manifest.creating(parts / "checkpoint", kind="checkpoint") as partial:
            (partial / "model.safetensors").write_bytes(content.encode() * 1000)
            (partial / "config.json").write_text(json.dumps({"model": content}))
        with manifest.creating(parts / "onnx", kind="onnx") as partial:
            (partial / "model.onnx").write_bytes(content.encode() * 500)
        candidate = manifest.read(parts / "checkpoint").digest
        identity = {"candidate": candidate, "exports": {"onnx": manifest.read(parts / "onnx").digest}}
        data = {**report_json, "identity": {**report_json["identity"], **identity}, **report}
        unjudged = Report.model_validate(data)
        policy = Policy(gates=(Gate(metric="sizes.parameters.ratio", bound="point", max=limit),))
        judged = unjudged.judged(judge(unjudged, policy)) if limit else unjudged
        release = parts / "release"
        with manifest.creating(release, kind="release", parents={"checkpoint": candidate}) as partial:
            shutil.copytree(parts / "checkpoint", partial / "checkpoint")
            shutil.copytree(parts / "onnx", partial / "onnx")
            write(judged, partial / "report.json")
            (partial / "report.md").write_text(markdown(judged))
            change(partial)
        return release

    return make


def stored(workspace: Path, version: registries.Version) -> Path:
    return workspace / "registry" / "artifacts" / version.run_id / "artifacts" / "release"


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def artifact_folders(workspace: Path) -> list[str]:
    artifacts = workspace / "registry" / "artifacts"
    return sorted(os.listdir(artifacts)) if artifacts.exists() else []


def run_child(script: str, *arguments: object) -> subprocess.Popen[str]:
    """A process of its own that runs `script` with the registry at hand."""
    head = "import os, signal, sys\nfrom pathlib import Path\nfrom numprune.serving import registry as registries\n"
    return subprocess.Popen(
        [sys.executable, "-c", head + script, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# --- publish ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_passed_release_becomes_the_candidate(registry: Registry, workspace: Path, make_release: MakeRelease) -> None:
    release = make_release()
    version = registries.publish(registry, release, NAME)
    whole = manifest.read(release)
    assert (version.reference, version.aliases, version.verdict) == ("tiny-llama/1", ("candidate",), "pass")
    assert version.digest == whole.digest
    assert version.tags["numprune.checkpoint"] == whole.parents["checkpoint"]
    assert version.tags["numprune.report"] == whole.files["report.json"].sha256
    assert contents(stored(workspace, version)) == contents(release)
    assert registries.list_versions(registry, NAME) == [version]
    assert registries.list_models(registry) == [registries.Model(NAME, {"candidate": 1})]
    shown = registries.show(registry, f"{NAME}@candidate")
    assert shown.version == version
    assert shown.report.verdict is not None
    assert shown.files[WEIGHTS] == 1000


def test_the_same_release_is_published_once(registry: Registry, workspace: Path, make_release: MakeRelease) -> None:
    first, second = make_release("a"), make_release("b")
    one = registries.publish(registry, first, NAME)
    assert registries.publish(registry, first, NAME) == one
    two = registries.publish(registry, second, NAME)
    assert (two.version, two.aliases) == (2, ("candidate",))
    again = registries.publish(registry, first, NAME)
    assert (again.version, again.aliases) == (1, ())  # the candidate does not go back
    assert registries.publish(registry, first, "other").reference == "other/1"
    assert len(artifact_folders(workspace)) == 3


NLL_GATE = {"metric": "quality.loss_delta", "bound": "ci95_upper"}


@pytest.mark.parametrize(
    ("limit", "valid", "outcome", "code", "named"),
    [
        (0.01, True, "fail", 2, "quality.loss_delta"),
        (0.05, True, "inconclusive", 3, "quality.loss_delta"),
        (0.1, False, "invalid environment", 4, "the GPU is throttled"),
    ],
)
def test_a_release_that_did_not_pass_is_not_published(
    registry: Registry,
    workspace: Path,
    make_release: MakeRelease,
    report_json: Json,
    limit: float,
    valid: bool,
    outcome: str,
    code: int,
    named: str,
) -> None:
    if not valid:
        report_json["environment"] |= {"valid": False, "reasons": ["the GPU is throttled"]}
    unjudged = Report.model_validate(report_json)
    verdict = judge(unjudged, Policy(gates=(Gate(max=limit, **NLL_GATE),)))
    release = make_release(limit=0, **unjudged.judged(verdict).to_json() | {"identity": report_json["identity"]})
    with pytest.raises(RefusedReleaseError, match=named) as refused:
        registries.publish(registry, release, NAME)
    assert outcome in str(refused.value)
    assert (refused.value.exit_code, refused.value.verdict.outcome) == (code, outcome)
    assert registries.list_models(registry) == []
    assert registry.client.search_registered_models() == []
    assert artifact_folders(workspace) == []


def _break_nested(partial: Path) -> None:
    (partial / WEIGHTS).write_bytes(b"other weights")


def _add_part(partial: Path) -> None:
    with manifest.creating(partial / "tensorrt", kind="tensorrt") as engine:
        (engine / "engine").write_bytes(b"never measured")


def _replace_checkpoint(partial: Path) -> None:
    shutil.rmtree(partial / "checkpoint")
    with manifest.creating(partial / "checkpoint", kind="checkpoint") as other:
        (other / "model.safetensors").write_bytes(b"another model")


def _cheat(partial: Path) -> None:
    """Turn a failed verdict into a passed one, consistently."""
    text = (partial / "report.json").read_text()
    (partial / "report.json").write_text(text.replace('"outcome": "fail"', '"outcome": "pass"'))


@pytest.mark.parametrize(
    ("change", "limit", "message"),
    [
        (lambda partial: (partial / "report.json").unlink(), 0.8, "report.json: missing"),
        (lambda partial: shutil.rmtree(partial / "checkpoint"), 0.8, "checkpoint"),
        (lambda partial: (partial / "checkpoint/manifest.json").unlink(), 0.8, "checkpoint/manifest.json: missing"),
        (lambda partial: (partial / "checkpoint/extra.txt").write_text("x"), 0.8, "checkpoint: its files"),
        (lambda partial: (partial / "report.json").write_text("{}"), 0.8, "report.json: schema"),
        (_break_nested, 0.8, "checkpoint: its files"),
        (_replace_checkpoint, 0.8, "checkpoint: its digest is .*, but the report is about"),
        (_add_part, 0.8, "tensorrt: .*no such part"),
        (_cheat, 0.7, "verdict says pass for sizes.parameters.ratio, but .* fail"),
        (lambda _: None, 0, "not judged"),
    ],
)
def test_an_altered_release_is_not_published(
    registry: Registry, make_release: MakeRelease, change: Any, limit: float, message: str
) -> None:
    release = make_release(change=change, limit=limit)
    with pytest.raises((IntegrityError, InputError), match=message):
        registries.publish(registry, release, NAME)
    assert registry.client.search_registered_models() == []


def test_a_damaged_or_foreign_folder_is_not_published(
    registry: Registry, make_release: MakeRelease, tmp_path: Path
) -> None:
    release = make_release()
    with pytest.raises(InputError, match="contains a checkpoint"):
        registries.publish(registry, release.parent / "checkpoint", NAME)
    with pytest.raises(InputError, match="no such folder"):
        registries.publish(registry, tmp_path / "nowhere", NAME)
    flip_bit(release / WEIGHTS)
    with pytest.raises(IntegrityError, match=r"model\.safetensors"):
        registries.publish(registry, release, NAME)
    assert registry.client.search_registered_models() == []


def test_a_foreign_version_is_not_ours(registry: Registry, make_release: MakeRelease) -> None:
    version = registries.publish(registry, make_release(), NAME)
    registry.client.create_model_version(NAME, source="file:///tmp/x")
    registry.client.create_registered_model("somebody-elses")
    with pytest.raises(IntegrityError, match="not published by numprune"):
        registries.promote(registry, f"{NAME}/2")
    assert registries.list_versions(registry, NAME) == [version]
    assert [model.name for model in registries.list_models(registry)] == [NAME]


# --- what a kill leaves ----------------------------------------------------------------------------

KILLED_PUBLISH = """
registry = registries.open_registry(None, Path(sys.argv[1]))
die = lambda *arguments, **options: os.kill(os.getpid(), signal.SIGKILL)
where = sys.argv[4]
if where == "copying":
    import shutil
    copy, count = shutil.copyfile, []
    shutil.copyfile = lambda *arguments: (count.append(1), die() if len(count) == 3 else copy(*arguments))
elif where == "artifacts":
    type(registry.artifacts).put = die
else:
    setattr(type(registry.client), where, die)
registries.publish(registry, Path(sys.argv[2]), sys.argv[3])
"""


@pytest.mark.parametrize(
    ("where", "published"),
    [
        ("copying", False),
        ("create_model_version", False),
        ("set_terminated", True),  # the version is there and whole: it counts
        ("set_registered_model_alias", True),
    ],
)
@pytest.mark.slow
def test_a_killed_publisher_leaves_nothing_half_made(
    workspace: Path, make_release: MakeRelease, where: str, published: bool
) -> None:
    release = make_release()
    child = run_child(KILLED_PUBLISH, workspace, release, NAME, where)
    assert child.wait(120) == -signal.SIGKILL, child.communicate()
    registry = registries.open_registry(None, workspace)
    left = registries.list_versions(registry, NAME)
    assert len(left) == published
    assert all(registries.verify(registry, version.reference) for version in left)
    assert len(artifact_folders(workspace)) == 1  # an orphan, or the version's
    version = registries.publish(registry, release, NAME)
    assert (version.version, version.aliases) == (1, ("candidate",))
    assert artifact_folders(workspace) == [version.run_id]
    assert contents(stored(workspace, version)) == contents(release)
    runs = registry.client.search_runs([registry.experiment])
    assert [(run.info.run_id, run.info.status) for run in runs] == [(version.run_id, "FINISHED")]


KILLED_MOVE = """
registry = registries.open_registry(None, Path(sys.argv[1]))
die = lambda *arguments, **options: os.kill(os.getpid(), signal.SIGKILL)
client = type(registry.client)
if sys.argv[3] == "before":
    client.set_registered_model_alias = die
else:
    move = client.set_registered_model_alias
    client.set_registered_model_alias = lambda *arguments: (move(*arguments), die())
{"promote": registries.promote, "rollback": registries.rollback}[sys.argv[2]](registry, sys.argv[4])
"""


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.slow
def test_a_killed_promotion_or_rollback_is_atomic(workspace: Path, make_release: MakeRelease, when: str) -> None:
    registry = registries.open_registry(None, workspace)
    for content in "ab":
        registries.publish(registry, make_release(content), NAME)
    registries.promote(registry, f"{NAME}/1")

    child = run_child(KILLED_MOVE, workspace, "promote", when, NAME)
    assert child.wait(120) == -signal.SIGKILL, child.communicate()
    assert registries.verify(registry, NAME).version == (1 if when == "before" else 2)
    registries.promote(registry, NAME)

    child = run_child(KILLED_MOVE, workspace, "rollback", when, NAME)
    assert child.wait(120) == -signal.SIGKILL, child.communicate()
    assert registries.verify(registry, NAME).version == (2 if when == "before" else 1)
    if when == "before":
        assert registries.rollback(registry, NAME).version == 1
    with pytest.raises(InputError, match="no version was in production before tiny-llama/1"):
        registries.rollback(registry, NAME)


@pytest.fixture(scope="module")
def actors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Actors]:
    forking = Actors(tmp_path_factory.mktemp("actors"))
    yield forking
    forking.close()


class Killed:
    """A command on copies of one workspace, killed between its steps: see `actor.act`."""

    def __init__(
        self,
        actors: Actors,
        workspace: Path,
        do: str,
        *arguments: object,
        times: int = 5,
        forget: Callable[[], object] = lambda: None,
    ) -> None:
        self._actors, self._workspace, self._do, self._arguments = actors, workspace, do, arguments
        self._times = times
        self._forget = forget

    def everywhere(self) -> Iterator[tuple[int, Path, Registry]]:
        """After each kill: its step, the workspace and the registry in it, as they were left.

        There are more steps than there is time for; the first and the last are among those that are taken.
        """
        whole = self._copy("whole")
        steps = self.again(whole)["steps"]
        shutil.rmtree(whole)
        self._forget()
        assert steps > self._times
        for step in sorted({round(share * (steps - 1) / (self._times - 1)) for share in range(self._times)}):
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


@pytest.mark.slow
def test_a_publisher_killed_at_any_step_leaves_nothing_half_made(
    actors: Actors, registry: Registry, workspace: Path, make_release: MakeRelease
) -> None:
    first, second = make_release("a"), make_release("b")
    registries.publish(registry, first, NAME)
    registries.promote(registry, NAME)
    killed = Killed(actors, workspace, "publish", second, NAME, times=8)
    seen = set()
    for step, copy, left in killed.everywhere():
        versions = [registries.verify(left, version.reference) for version in registries.list_versions(left, NAME)]
        seen.add(len(versions))
        assert len(versions) in (1, 2)
        assert registries.verify(left, NAME).version == 1  # production
        assert registries.verify(left, f"{NAME}@candidate").version in (1, 2)
        registries.publish(left, second, NAME)
        assert registries.verify(left, f"{NAME}@candidate").digest == manifest.read(second).digest, step
        assert [version.version for version in registries.list_versions(left, NAME)] == [1, 2]
        assert len(artifact_folders(copy)) == 2
    assert seen == {1, 2}


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


# --- damage ----------------------------------------------------------------------------------------


def _rewrite_with_its_manifest(folder: Path) -> None:
    """Other weights under a manifest that agrees with them."""
    (folder / WEIGHTS).write_bytes(b"other weights")
    found = manifest.read(folder)
    changed = folder.with_name("changed")
    shutil.copytree(folder, changed, ignore=shutil.ignore_patterns("manifest.json"))
    shutil.rmtree(folder)
    with manifest.creating(folder, kind=found.kind, parents=found.parents) as partial:
        shutil.copytree(changed, partial, dirs_exist_ok=True)
    shutil.rmtree(changed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda folder: flip_bit(folder / WEIGHTS), WEIGHTS),
        (lambda folder: flip_bit(folder / "report.json"), "report.json"),
        (lambda folder: flip_bit(folder / "manifest.json"), "manifest.json"),
        (lambda folder: (folder / WEIGHTS).unlink(), WEIGHTS),
        (lambda folder: (folder / "surplus.bin").write_bytes(b"x"), "surplus.bin"),
        (lambda folder: shutil.rmtree(folder), "release: missing"),
        (_rewrite_with_its_manifest, "manifest.json has the digest"),
    ],
)
def test_damage_is_named_blocks_everything_and_is_repaired_by_publishing_again(
    registry: Registry, workspace: Path, make_release: MakeRelease, tmp_path: Path, damage: Any, named: str
) -> None:
    first, second = make_release("a"), make_release("b")
    one = registries.publish(registry, first, NAME)
    registries.promote(registry, NAME)
    registries.publish(registry, second, NAME)
    registries.promote(registry, NAME)
    assert registries.verify(registry, f"{NAME}/1").version == 1

    damage(stored(workspace, one))
    with pytest.raises(IntegrityError, match=named):
        registries.verify(registry, f"{NAME}/1")
    with pytest.raises(IntegrityError, match=named):
        registries.fetch(registry, f"{NAME}/1", tmp_path / "out")
    with pytest.raises(IntegrityError, match=named):
        registries.promote(registry, f"{NAME}/1")
    with pytest.raises(IntegrityError, match=named):
        registries.rollback(registry, NAME)
    assert not [name for name in os.listdir(tmp_path) if "out" in name]
    assert registries.verify(registry, NAME).version == 2  # production stands, and is whole

    assert registries.publish(registry, first, NAME).version == 1
    assert registries.rollback(registry, NAME).version == 1


def test_a_verdict_in_the_tags_alone_is_not_enough(
    registry: Registry, workspace: Path, make_release: MakeRelease
) -> None:
    version = registries.publish(registry, make_release(), NAME)
    registry.client.set_model_version_tag(NAME, "1", "numprune.verdict", "fail")
    with pytest.raises(IntegrityError, match="only a passing release"):
        registries.promote(registry, NAME)
    failed = make_release("failed", limit=0.7)
    shutil.rmtree(stored(workspace, version))
    registry.artifacts.put(version.run_id, failed)
    registry.client.set_model_version_tag(NAME, "1", "numprune.verdict", "pass")
    registry.client.set_model_version_tag(NAME, "1", "numprune.release", manifest.read(failed).digest)
    with pytest.raises(IntegrityError, match="'fail' in the report"):
        registries.promote(registry, NAME)


# --- production ------------------------------------------------------------------------------------


def test_promotion_and_rollback_follow_the_history(registry: Registry, make_release: MakeRelease) -> None:
    for content in "abc":
        registries.publish(registry, make_release(content), NAME)
    with pytest.raises(InputError, match="nothing is in production"):
        registries.rollback(registry, NAME)
    with pytest.raises(InputError, match=r"no alias 'production'; its aliases: candidate \(3\)"):
        registries.verify(registry, NAME)
    assert registries.promote(registry, f"{NAME}/1").aliases == ("production",)
    assert registries.promote(registry, f"{NAME}/2").version == 2
    assert registries.promote(registry, f"{NAME}/2").version == 2  # again: no second entry
    assert registries.promote(registry, f"{NAME}@candidate").aliases == ("candidate", "production")
    assert [registries.rollback(registry, NAME).version for _ in range(2)] == [2, 1]
    with pytest.raises(InputError, match="no version was in production before tiny-llama/1"):
        registries.rollback(registry, NAME)
    assert registries.verify(registry, NAME).version == 1
    assert registries.promote(registry, NAME).version == 3
    assert registries.rollback(registry, NAME).version == 1


def test_an_undone_promotion_leaves_no_trace(registry: Registry, make_release: MakeRelease) -> None:
    for content in "ab":
        registries.publish(registry, make_release(content), NAME)
    registries.promote(registry, f"{NAME}/1")
    with pytest.raises(IntegrityError, match="tiny-llama/2: no longer in production"):
        registries.take_back(registry, f"{NAME}/2")
    assert registries.take_back(registry, f"{NAME}/1") is None  # nothing was before
    with pytest.raises(InputError, match=r"nothing is in production; .*versions: none"):
        registries.rollback(registry, NAME)
    registries.promote(registry, f"{NAME}/1")
    registries.promote(registry, f"{NAME}/2")
    taken_back = registries.take_back(registry, f"{NAME}/2")
    assert taken_back is not None
    assert taken_back.version == 1
    with pytest.raises(InputError, match="no version was in production before"):
        registries.rollback(registry, NAME)


def test_moves_made_in_mlflow_are_part_of_the_history(registry: Registry, make_release: MakeRelease) -> None:
    for content in "abc":
        registries.publish(registry, make_release(content), NAME)
    registries.promote(registry, f"{NAME}/1")
    registry.client.set_registered_model_alias(NAME, "production", "2")
    registries.promote(registry, f"{NAME}/3")
    assert [registries.rollback(registry, NAME).version for _ in range(2)] == [2, 1]
    registries.promote(registry, f"{NAME}/2")
    registry.client.delete_model_version(NAME, "2")  # its alias goes with it
    with pytest.raises(InputError, match=r"nothing is in production; .*\(earlier production versions: 2, 1\)"):
        registries.rollback(registry, NAME)
    assert registries.promote(registry, f"{NAME}/1").version == 1


def test_a_deleted_version_cannot_be_rolled_back_to(registry: Registry, make_release: MakeRelease) -> None:
    for content in "ab":
        registries.publish(registry, make_release(content), NAME)
        registries.promote(registry, NAME)
    registry.client.delete_model_version(NAME, "1")
    with pytest.raises(InputError, match="tiny-llama/1: no such version"):
        registries.rollback(registry, NAME)
    assert registries.verify(registry, NAME).version == 2


@pytest.mark.parametrize(
    "text", ["{", '{"history": "1"}', '{"history": [], "more": 1}', '{"history": [1], "next": []}']
)
def test_a_damaged_history_is_reported(registry: Registry, make_release: MakeRelease, text: str) -> None:
    registries.publish(registry, make_release(), NAME)
    registry.client.set_registered_model_tag(NAME, "numprune.production", text)
    with pytest.raises(IntegrityError, match=r"tag numprune\.production is damaged"):
        registries.promote(registry, NAME)


# --- artifacts behind MLflow's own client, as with a server ------------------------------------------


@pytest.fixture
def remote(registry: Registry, tmp_path: Path) -> Iterator[Registry]:
    """Versions in MLflow's SQLite still, as its server needs packages that we do not; files over HTTP."""
    with storing(tmp_path / "remöte") as address:
        yield remote_with(registry, address)


def remote_with(registry: Registry, location: str) -> Registry:
    """With this artifact location."""
    experiment = registry.client.create_experiment("remote", artifact_location=location)
    artifacts = ServerArtifacts(registry.client, registry.uri)
    return dataclasses.replace(registry, artifacts=artifacts, experiment=experiment, embedded=False)


@pytest.mark.slow
def test_files_round_trip_through_mlflow(remote: Registry, make_release: MakeRelease, tmp_path: Path) -> None:
    first, second = make_release("a"), make_release("b")
    version = registries.publish(remote, first, NAME)
    assert registries.publish(remote, first, NAME) == version
    assert registries.publish(remote, second, NAME).version == 2
    assert registries.show(remote, f"{NAME}/1").files[WEIGHTS] == 1000
    assert registries.fetch(remote, f"{NAME}/1", tmp_path / "out").version == 1
    assert contents(tmp_path / "out") == contents(first)
    assert registries.promote(remote, f"{NAME}/1").version == 1
    assert registries.promote(remote, NAME).version == 2

    flip_bit(tmp_path / "remöte" / version.run_id / "artifacts" / "release" / WEIGHTS)
    for broken in (registries.verify, registries.promote):
        with pytest.raises(IntegrityError, match=rf"MLflow run {version.run_id}/{WEIGHTS}: its SHA-256"):
            broken(remote, f"{NAME}/1")
    with pytest.raises(IntegrityError, match=f"{NAME}/1/{WEIGHTS}: its SHA-256"):
        registries.fetch(remote, f"{NAME}/1", tmp_path / "again")
    with pytest.raises(IntegrityError, match=WEIGHTS):
        registries.rollback(remote, NAME)
    assert registries.verify(remote, NAME).version == 2
    shutil.rmtree(tmp_path / "remöte" / version.run_id / "artifacts" / "release")
    for broken in (registries.verify, registries.show):
        with pytest.raises((IntegrityError, RegistryError), match=version.run_id):
            broken(remote, f"{NAME}/1")
    assert not [name for name in os.listdir(tmp_path) if "again" in name]


def test_a_store_names_its_missing_package(
    registry: Registry, make_release: MakeRelease, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the server hands out addresses of its store instead of passing the files on."""
    monkeypatch.setitem(sys.modules, "boto3", None)
    remote = remote_with(registry, "s3://bucket/releases")
    with pytest.raises(RegistryError, match=r"registry .*needs the Python package boto3; install it here"):
        registries.publish(remote, make_release(), NAME)
    assert registries.list_versions(remote, NAME) == []


@pytest.mark.parametrize("form", ["{folder}", "file://{folder}"])
def test_no_local_folder_is_used_for_a_server(
    registry: Registry, make_release: MakeRelease, tmp_path: Path, form: str
) -> None:
    """MLflow's client takes the path that a server gives for its own."""
    folder = tmp_path / "srv"
    remote = remote_with(registry, form.format(folder=folder))
    with pytest.raises(RegistryError, match=rf"keeps artifacts in {form.format(folder=folder)}/.*, a local folder, "):
        registries.publish(remote, make_release(), NAME)
    assert not list(folder.rglob("*.safetensors"))
    assert registries.list_versions(remote, NAME) == []

    # A version from before this was refused: its files are whole, on the disk of whoever published it.
    run = remote.client.create_run(remote.experiment)
    release = make_release()
    remote.client.log_artifacts(run.info.run_id, str(release), "release")
    tags = {RELEASE: manifest.read(release).digest, VERDICT: "pass"}
    remote.client.create_model_version(NAME, source=str(folder), run_id=run.info.run_id, tags=tags)
    for ask in (registries.verify, registries.promote, registries.show):
        with pytest.raises(RegistryError, match=r"a local folder, .*publish the release again"):
            ask(remote, f"{NAME}/1")


@pytest.mark.parametrize(
    ("location", "shared"),
    [
        ("/srv/mlflow/1", False),
        ("srv/mlflow/1", False),
        ("file:///srv/mlflow/1", False),
        ("C:/mlflow/1", False),
        ("mlflow-artifacts:/1", True),
        ("s3://bucket/1", True),
        ("https://mlflow.example/api/2.0/mlflow-artifacts/artifacts/1", True),
    ],
)
def test_a_server_whose_artifact_location_is_a_local_folder_is_refused_when_connecting(
    tmp_path: Path, location: str, shared: bool
) -> None:
    """MLflow's own answer, as with `mlflow server --default-artifact-root /srv/mlflow --no-serve-artifacts`."""
    experiment = {
        "experiment_id": "7",
        "name": "numprune",
        "artifact_location": location,
        "lifecycle_stage": "active",
        "last_update_time": 1795856395069,
        "creation_time": 1795856395069,
    }
    answers = {**VERSION, "/api/2.0/mlflow/experiments/get-by-name": (200, json.dumps({"experiment": experiment}))}
    with answering(answers) as uri:
        if shared:
            assert registries.open_registry(uri, tmp_path).experiment == "7"
            return
        with pytest.raises(RegistryError, match=rf"keeps artifacts in {location}, a local folder") as refused:
            registries.open_registry(uri, tmp_path)
    assert "--serve-artifacts" in str(refused.value)
    assert "rename --experiment-id 7 --new-name numprune-7" in str(refused.value)


def test_a_publisher_elsewhere_is_left_alone(remote: Registry, make_release: MakeRelease) -> None:
    alive = remote.client.create_run(remote.experiment, tags={"numprune.publisher": "elsewhere 1 1.00"})
    dead = remote.client.create_run(remote.experiment, tags={"numprune.publisher": f"{socket.gethostname()} 1 1.00"})
    registries.publish(remote, make_release(), NAME)
    stages = {run.info.run_id: run.info.lifecycle_stage for run in map(remote.client.get_run, _ids(alive, dead))}
    assert stages == {alive.info.run_id: "active", dead.info.run_id: "deleted"}


def _ids(*runs: Any) -> list[str]:
    return [run.info.run_id for run in runs]


def test_the_first_of_two_identical_remote_publications_wins(
    remote: Registry, make_release: MakeRelease, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No lock reaches over machines: the other one publishes between our look and our version."""
    release = make_release()
    put = ServerArtifacts.put

    def while_another_publishes(self: ServerArtifacts, run_id: str, folder: Path) -> str:
        monkeypatch.setattr(ServerArtifacts, "put", put)
        elsewhere = dataclasses.replace(remote, lock_file=remote.lock_file.with_name("elsewhere"))
        monkeypatch.setattr(publishing, "_is_dead", lambda _: False)
        registries.publish(elsewhere, folder, NAME)
        return put(self, run_id, folder)

    monkeypatch.setattr(ServerArtifacts, "put", while_another_publishes)
    assert registries.publish(remote, release, NAME).version == 1
    assert [version.version for version in registries.list_versions(remote, NAME)] == [1]
    assert len(remote.client.search_runs([remote.experiment])) == 1


# --- fetch, references, addresses ------------------------------------------------------------------


def test_a_fetched_release_is_the_published_one(registry: Registry, make_release: MakeRelease, tmp_path: Path) -> None:
    release = make_release()
    registries.publish(registry, release, NAME)
    out = tmp_path / "ge holt" / "release"
    assert registries.fetch(registry, f"{NAME}@candidate", out).version == 1
    assert contents(out) == contents(release)
    assert os.listdir(out.parent) == ["release"]
    (out / WEIGHTS).write_bytes(b"x")  # the copy is the caller's: the store does not follow
    assert registries.verify(registry, f"{NAME}/1").version == 1
    with pytest.raises(InputError, match="already exists"):
        registries.fetch(registry, f"{NAME}@candidate", out)


def test_a_workspace_may_move(registry: Registry, workspace: Path, make_release: MakeRelease, tmp_path: Path) -> None:
    registries.publish(registry, make_release("a"), NAME)
    moved = registries.open_registry(None, shutil.move(workspace, tmp_path / "elsewhere"))
    assert registries.verify(moved, f"{NAME}/1").version == 1
    assert registries.publish(moved, make_release("b"), NAME).version == 2
    assert registries.promote(moved, NAME).version == 2
    assert not workspace.exists()


@pytest.mark.parametrize(
    "text", ["", "a@", "a/", "a/0", "a/x", "a/1/2", "@b", "a b", "../a", "a@b@c", "a/-1", "a'", "a/01"]
)
def test_invalid_references_are_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"not a (reference|valid model name)"):
        registries.parse(text)


def test_references_are_parsed() -> None:
    assert registries.parse("größe-1.5") == registries.ModelReference("größe-1.5", "production", None)
    assert registries.parse("a", "candidate").alias == "candidate"
    assert registries.parse("a@b").alias == "b"
    assert registries.parse("a/12").version == 12
    assert [str(registries.parse(text)) for text in ("a", "a@b", "a/12")] == ["a@production", "a@b", "a/12"]


def test_unknown_names_versions_and_aliases_are_named(registry: Registry, make_release: MakeRelease) -> None:
    registries.publish(registry, make_release(), NAME)
    for ask in (registries.list_versions, registries.rollback, registries.verify, registries.promote):
        with pytest.raises(InputError, match=r"tiny-lama: no such model .*did you mean tiny-llama\?"):
            ask(registry, "tiny-lama")
    with pytest.raises(InputError, match="tiny-llama/7: no such version"):
        registries.show(registry, f"{NAME}/7")
    with pytest.raises(InputError, match="not a valid model name"):
        registries.publish(registry, make_release("b"), "a/b")


@pytest.mark.parametrize("uri", ["sqlite:///x.db", "mlruns", "", "file:///x", "databricks"])
def test_only_server_addresses_are_accepted(uri: str, tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="not an MLflow server's address"):
        registries.open_registry(uri, tmp_path)


def test_an_unreachable_server_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(RegistryError, match=r"http://127\.0\.0\.1:1 cannot be reached \(Connection refused\): .*again"):
        registries.open_registry("http://127.0.0.1:1", tmp_path)


VERSION = {"/version": (200, "3.17.2")}


@pytest.mark.parametrize(
    ("status", "version", "message"),
    [
        (
            200,
            "2.20.4",
            r"MLflow 2\.20\.4 is not supported; update the server to 2\.21 or newer, below 4\.0",
        ),
        (200, "1.30.0", r"MLflow 1\.30\.0 is not"),
        (200, "4.0.0", r"MLflow 4\.0\.0 is not"),
        (
            200,
            "<!doctype html><title>Log in</title>",
            r"/version returned 200 .*Log in.*login page",
        ),
        (404, "2.21", "returned 404 .*check the address"),
        (401, "", r"rejects the credentials \(401\)"),
    ],
)
def test_unsupported_servers_are_refused_when_connecting(
    tmp_path: Path, status: int, version: str, message: str
) -> None:
    with answering({"/version": (status, version)}) as uri, pytest.raises(RegistryError, match=message):
        registries.open_registry(uri, tmp_path)


@pytest.mark.parametrize("version", ["2.21.0", "2.22.0rc1", "3.17.2", "3.18.1.dev0"])
def test_supported_servers_are_used(tmp_path: Path, version: str) -> None:
    with answering({"/version": (200, version)}) as uri, pytest.raises(RegistryError, match="experiments/get-by-name"):
        registries.open_registry(uri, tmp_path)


def test_an_unresponsive_server_does_not_get_the_upload_timeout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    monkeypatch.setattr(connection, "_VERSION_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        message = rf"registry {uri} cannot be reached \(timed out\): check that it is running"
        with pytest.raises(RegistryError, match=message) as refused:
            registries.open_registry(uri, tmp_path)
    assert "read timeout=0.2" in str(refused.value.__cause__)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        (
            "http://ann:s3cret@mlflow.example",
            r"http://\*\*\*@mlflow.example: contains credentials; set MLFLOW_TRACKING_USER",
        ),
        ("https://:s3cret@mlflow.example/x", "contains credentials"),
        (
            "postgresql://ann:s3cr@et@db.example/mlflow",
            r"'postgresql://\*\*\*@db.example/mlflow': not an MLflow server's",
        ),
        ("http://mlflow.example?token=s3cret", "cannot contain"),
    ],
)
def test_addresses_with_secrets_are_refused_without_repeating_them(uri: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match=message) as refused:
        registries.open_registry(uri, tmp_path)
    assert "s3cr" not in str(refused.value)
    assert "ann:" not in str(refused.value)


@pytest.mark.parametrize("name", ["MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD"])
def test_neither_errors_nor_tracebacks_contain_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A token with the line break of the file it was read from is repeated by MLflow's own error."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    secret = secrets.token_hex()  # a traceback also shows lines of this file
    monkeypatch.setenv(name, f"{secret}\n")
    with pytest.raises(RegistryError) as refused:
        registries.open_registry(f"http://127.0.0.1:1/{secret}", tmp_path)
    assert secret not in "".join(traceback.format_exception(refused.value))
    if name == "MLFLOW_TRACKING_TOKEN":
        assert "MLFLOW_TRACKING_TOKEN cannot be sent" in str(refused.value)


def test_an_unusable_registry_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "registry").write_text("a file where the folder should be")
    with pytest.raises(RegistryError, match="registry"):
        registries.open_registry(None, tmp_path)
    (tmp_path / "broken" / "registry").mkdir(parents=True)
    (tmp_path / "broken" / "registry" / "mlflow.db").write_bytes(b"no database" * 1000)
    with pytest.raises(RegistryError, match="not a database"):
        registries.open_registry(None, tmp_path / "broken")
    for name in ("what?", "100%", "a#b"):
        with pytest.raises(RegistryError, match="choose another workspace"):
            registries.open_registry(None, tmp_path / name)


def test_importing_the_registry_does_not_import_mlflow() -> None:
    child = run_child("print('mlflow' in sys.modules)")
    assert child.communicate(timeout=60) == ("False\n", "")
