# ruff: noqa: F811 - fixtures of other files
"""A team's registry: MLflow's server on PostgreSQL and an S3 store, with several users and any part of it lost."""

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from numprune.export import manifest
from numprune.serving import registry as registries
from numprune.serving.registry import Registry
from tests.flows.conftest import Answered, numprune  # noqa: F401 - a fixture
from tests.serving import releases
from tests.serving.team import PASSWORD, USER, Actors, Ended, Lost, Team, running
from tests.serving.workspaces import WEIGHTS, MakeRelease, contents, flip_bit

pytestmark = pytest.mark.slow

UPLOAD = "PUT /api/2.0/mlflow-artifacts"
DOWNLOAD = "GET /api/2.0/mlflow-artifacts"
CREATE_RUN = "POST /api/2.0/mlflow/runs/create"
CREATE_VERSION = "POST /api/2.0/mlflow/model-versions/create"
SET_ALIAS = "POST /api/2.0/mlflow/registered-models/alias"
SET_TAG = "POST /api/2.0/mlflow/registered-models/set-tag"

CREDENTIALS = {"MLFLOW_TRACKING_USERNAME": USER, "MLFLOW_TRACKING_PASSWORD": PASSWORD}
IMPATIENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}  # else each loss costs twelve seconds
ENVIRONMENT = {**CREDENTIALS, **IMPATIENT, "MLFLOW_DISABLE_TELEMETRY": "true"}


@pytest.fixture(scope="module")
def _running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Team, Actors]]:
    folder = tmp_path_factory.mktemp("team")
    actors = Actors(folder)
    try:
        with running(folder) as team:
            yield team, actors
    finally:
        actors.close()


@pytest.fixture
def team(_running: tuple[Team, Actors], monkeypatch: pytest.MonkeyPatch) -> Team:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    _running[0].relay.reset()
    return _running[0]


class Person:
    """Somebody at a machine of their own: no lock file reaches from one to the other."""

    def __init__(self, team: Team, actors: Actors, workspace: Path) -> None:
        self._team, self._actors, self._workspace = team, actors, workspace

    def start(self, do: str, *arguments: object, **environment: str) -> Any:
        settings = {"environment": {**ENVIRONMENT, **environment}}
        return self._actors.start(do, *arguments, uri=self._team.uri, workspace=self._workspace, **settings)

    def run(self, do: str, *arguments: object, **environment: str) -> Ended:
        ended: Ended = self.start(do, *arguments, **environment).wait()
        return ended

    def killed(self, request: str, nth: int, do: str, *arguments: object) -> None:
        """`do`, killed with the nth `request` (counted from 0) on its way, which the server never sees."""
        known = threading.Event()
        pid: list[int] = []

        def kill() -> None:
            known.wait(60)
            os.kill(pid[0], signal.SIGKILL)
            raise Lost

        self._team.relay.reset()
        self._team.relay.at(request, kill, nth=nth)
        actor = self.start(do, *arguments)
        pid.append(actor.pid)
        known.set()
        assert actor.wait().code == -signal.SIGKILL
        self._team.relay.reset()


@pytest.fixture
def ann(_running: tuple[Team, Actors], team: Team, tmp_path: Path) -> Person:
    return Person(team, _running[1], tmp_path / "ann")


@pytest.fixture
def bob(_running: tuple[Team, Actors], team: Team, tmp_path: Path) -> Person:
    return Person(team, _running[1], tmp_path / "bob")


@pytest.fixture
def registry(team: Team, tmp_path: Path) -> Registry:
    return registries.open_registry(team.uri, tmp_path / "onlooker")


def numbers(registry: Registry, name: str) -> list[int]:
    """Of all versions that are to be seen, each of which must be whole."""
    found = registries.list_versions(registry, name)
    for version in found:
        registries.verify(registry, version.reference)
    return [version.version for version in found]


def aliases(registry: Registry, name: str) -> dict[str, int]:
    (found,) = [model for model in registries.list_models(registry) if model.name == name]
    return dict(found.aliases)


# --- the commands ----------------------------------------------------------------------------------


def test_the_commands_are_the_same(team: Team, numprune: Callable[..., Answered], tmp_path: Path) -> None:
    first = releases.make_release(releases.write_checkpoint(tmp_path / "model"), tmp_path / "first")
    found = manifest.read(first)
    with manifest.creating(tmp_path / "second", kind=found.kind, parents=found.parents) as second:
        shutil.copytree(
            first, second, ignore=lambda folder, _: ["manifest.json"] * (folder == str(first)), dirs_exist_ok=True
        )
        (second / "report.md").write_text("another one")
    where = ["--uri", team.uri, "--workspace", tmp_path / "w", "--json"]

    assert numprune("registry", "publish", first, "shared", *where).json["reference"] == "shared/1"
    assert numprune("registry", "promote", "shared", *where).json["aliases"] == ["candidate", "production"]
    assert numprune("registry", "publish", tmp_path / "second", "shared", *where).json["aliases"] == ["candidate"]
    assert numprune("registry", "promote", "shared", *where).json["version"] == 2
    assert numprune("registry", "rollback", "shared", *where).json["version"] == 1
    assert numprune("registry", "verify", "shared", *where).json["digest"] == found.digest
    listed = numprune("registry", "list", "shared", *where).json["versions"]
    assert [version["aliases"] for version in listed] == [["production"], ["candidate"]]
    assert {"name": "shared", "aliases": {"production": 1, "candidate": 2}} in numprune(
        "registry", "list", *where
    ).json["models"]
    assert numprune("registry", "show", "shared", *where).json["report"]["verdict"]["outcome"] == "pass"
    assert numprune("registry", "fetch", "shared", tmp_path / "out", *where).code == 0
    assert contents(tmp_path / "out") == contents(first)
    assert not any(path.name.endswith(".db") for path in (tmp_path / "w").rglob("*"))  # everything is on the server
    assert team.stored((first / WEIGHTS).read_bytes())


def test_a_wrong_password_or_token_is_refused_and_not_repeated(ann: Person) -> None:
    ended = ann.run("list_versions", "any", MLFLOW_TRACKING_PASSWORD="a-wr0ng-one")
    assert ended.code == 1
    assert "rejects the credentials (401): set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" in ended.said
    assert "wr0ng" not in ended.said
    tokens = {**dict.fromkeys(CREDENTIALS, ""), "MLFLOW_TRACKING_TOKEN": "a-wr0ng-one"}  # this server knows none
    ended = ann.run("list_versions", "any", **tokens)
    assert ended.code == 1
    assert "wr0ng" not in ended.said


# --- several at once -------------------------------------------------------------------------------


def test_concurrent_publishers(
    team: Team,
    ann: Person,
    bob: Person,
    registry: Registry,
    make_release: MakeRelease,
) -> None:
    """Each has stored its files and is about to make its version when the other one is, too."""
    left, right, same = make_release("l"), make_release("r"), make_release("s")
    seen: list[list[int]] = []
    both = threading.Barrier(2, action=lambda: seen.append(numbers(registry, "busy")), timeout=120)
    together = threading.Barrier(2, timeout=120)
    for nth in (0, 1):  # the first time that each points at what it published, when there is no alias yet
        team.relay.at(SET_ALIAS, together.wait, nth=nth)
    for releases_ in ((left, right), (same, same)):
        for nth in (0, 1):  # who asks again waits for nobody
            team.relay.at(CREATE_VERSION, both.wait, nth=nth)
        at_work = [
            person.start("publish", release, "busy") for person, release in zip((ann, bob), releases_, strict=True)
        ]
        ended = [actor.wait() for actor in at_work]
        team.relay.reset()
        assert [one.code for one in ended] == [0, 0], ended
    assert seen == [[], [1, 2]]  # nothing that was on its way
    versions = registries.list_versions(registry, "busy")
    assert [version.digest for version in versions[2:]] == [manifest.read(same).digest]  # twice the same: once
    assert {version.digest for version in versions[:2]} == {manifest.read(path).digest for path in (left, right)}
    assert numbers(registry, "busy") == [1, 2, versions[2].version]
    assert aliases(registry, "busy") == {"candidate": versions[2].version}


def test_concurrent_promotion_and_rollback_end_in_one_of_them(
    team: Team,
    ann: Person,
    bob: Person,
    registry: Registry,
    make_release: MakeRelease,
) -> None:
    for content in "abc":
        registries.publish(registry, make_release(content), "moving")

    def at_once(left: tuple[str, str], right: tuple[str, str]) -> list[Ended]:
        both = threading.Barrier(2, timeout=120)

        def meet() -> None:
            with suppress(threading.BrokenBarrierError):
                both.wait()

        for nth in (0, 1):  # who writes again waits for nobody
            team.relay.at(SET_ALIAS, meet, nth=nth)
        at_work = [person.start(*command) for person, command in ((ann, left), (bob, right))]
        while not any(actor.out.exists() for actor in at_work):
            time.sleep(0.05)
        both.abort()  # one may have lost before it wrote, and never comes
        ended: list[Ended] = [actor.wait() for actor in at_work]
        team.relay.reset()
        for one in ended:
            assert one.code == 0 or "another user moved production at the same time" in one.said, ended
        return ended

    at_once(("promote", "moving/1"), ("promote", "moving/2"))  # none was: both insert
    assert registries.verify(registry, "moving").version in (1, 2)
    registries.promote(registry, "moving/1")
    registries.promote(registry, "moving/2")
    ended = at_once(("promote", "moving/3"), ("rollback", "moving"))
    current = registries.verify(registry, "moving").version
    assert current in (1, 3)
    assert [one.code for one in ended if one.code == 0 and one.said["version"] == current] == [0]
    assert registries.promote(registry, "moving/2").version == 2  # the history was not damaged
    assert registries.rollback(registry, "moving").version == current


# --- a server that is lost -------------------------------------------------------------------------


def test_mlflow_killed_during_an_upload(
    team: Team,
    ann: Person,
    registry: Registry,
    make_release: MakeRelease,
    tmp_path: Path,
) -> None:
    release = make_release()
    team.relay.at(UPLOAD, team.server.kill, nth=2)
    ended = ann.run("publish", release, "lost")
    assert ended.code == 1
    assert f"registry {team.uri}" in ended.said
    assert "cannot be reached" in ended.said
    assert "run the same command again" in ended.said
    assert PASSWORD not in ended.said
    team.server.start()
    team.server.wait()
    assert numbers(registry, "lost") == []
    for use in ("promote", "verify", "rollback"):
        refused = ann.run(use, "lost")
        assert (refused.code, "InputError: lost" in refused.said) == (1, True), refused
    assert ann.run("fetch", "lost@candidate", tmp_path / "out").code == 1
    assert not (tmp_path / "out").exists()
    again = ann.run("publish", release, "lost")
    assert again.code == 0, again.said
    assert aliases(registry, "lost") == {"candidate": 1}
    assert numbers(registry, "lost") == [1]
    runs = registry.client.search_runs([registry.experiment], "attributes.status = 'RUNNING'")
    assert runs == []  # the lost one's was removed


def test_postgresql_killed_before_the_version_is_made(
    team: Team,
    ann: Person,
    registry: Registry,
    make_release: MakeRelease,
) -> None:
    release = make_release()
    team.relay.at(CREATE_VERSION, team.database.kill)
    ended = ann.run("publish", release, "broken")
    assert ended.code == 1
    assert f"registry {team.uri} returns errors" in ended.said
    assert "database" in ended.said
    team.relay.reset()
    team.restart_database()
    assert ann.run("promote", "broken").code == 1
    assert numbers(registry, "broken") == []
    again = ann.run("publish", release, "broken")
    assert again.code == 0, again.said
    assert (numbers(registry, "broken"), aliases(registry, "broken")) == ([1], {"candidate": 1})


def test_a_lost_response_creates_no_second_version(
    team: Team,
    ann: Person,
    registry: Registry,
    make_release: MakeRelease,
) -> None:
    """MLflow's client sends a request again though the server may have done what it asks for."""

    def lose() -> None:
        raise Lost

    for request in (CREATE_RUN, CREATE_VERSION):
        team.relay.at(request, lose, answered=True)
    ended = ann.run("publish", make_release(), "twice", MLFLOW_HTTP_REQUEST_MAX_RETRIES="1")
    assert ended.code == 0, ended.said
    assert [team.relay.seen.count(request) for request in (CREATE_RUN, CREATE_VERSION)] == [2, 2]
    assert (numbers(registry, "twice"), aliases(registry, "twice")) == ([1], {"candidate": 1})


def test_a_connection_lost_during_a_promotion(
    team: Team,
    ann: Person,
    registry: Registry,
    make_release: MakeRelease,
) -> None:
    for content in "ab":
        registries.publish(registry, make_release(content), "cut-off")
    registries.promote(registry, "cut-off/1")
    for do, before, then in (("promote", 1, 2), ("rollback", 2, 1)):
        for answered, stands in ((False, before), (True, then)):
            team.relay.cut(SET_ALIAS, answered=answered)
            ended = ann.run(do, "cut-off")
            assert ended.code == 1
            assert f"registry {team.uri} cannot be reached" in ended.said
            team.relay.reset()
            assert registries.verify(registry, "cut-off").version == stands
    assert "no version was in production before cut-off/1" in ann.run("rollback", "cut-off").said  # it was done
    assert ann.run("promote", "cut-off").said["version"] == 2


# --- people who are lost ---------------------------------------------------------------------------


def test_a_publisher_killed_at_any_change_leaves_nothing_half_made(
    team: Team,
    ann: Person,
    registry: Registry,
    make_release: MakeRelease,
) -> None:
    release = make_release()
    assert ann.run("publish", release, "whole").code == 0
    changes = [one for one in team.relay.seen if not one.startswith("GET") and not one.endswith("/search")]
    uploads = [one for one in changes if one.startswith(UPLOAD)]
    assert len(uploads) == len(contents(release))
    steps = [(one, 0) for one in dict.fromkeys(changes) if not one.startswith(UPLOAD)]
    for number, (request, nth) in enumerate([*steps, (UPLOAD, len(uploads) - 1)]):
        name = f"killed-{number}"
        ann.killed(request, nth, "publish", release, name)
        if name in [model.name for model in registries.list_models(registry)]:
            assert numbers(registry, name) in ([], [1])
        again = ann.run("publish", release, name)
        assert again.code == 0, again.said
        assert (numbers(registry, name), aliases(registry, name)) == ([1], {"candidate": 1}), request
    runs = registry.client.search_runs([registry.experiment], "attributes.status = 'RUNNING'")
    assert runs == []


def test_a_promotion_killed_at_any_change_is_atomic(
    team: Team,
    ann: Person,
    registry: Registry,
    make_release: MakeRelease,
) -> None:
    for content in "ab":
        registries.publish(registry, make_release(content), "abandoned")
    registries.promote(registry, "abandoned/1")
    for do, before, then in (("promote", 1, 2), ("rollback", 2, 1)):
        for request, nth, stands in ((SET_TAG, 0, before), (SET_ALIAS, 0, before), (SET_TAG, 1, then)):
            ann.killed(request, nth, do, "abandoned")
            assert registries.verify(registry, "abandoned").version == stands
    assert "no version was in production before abandoned/1" in ann.run("rollback", "abandoned").said
    assert ann.run("promote", "abandoned").said["version"] == 2
    assert registries.rollback(registry, "abandoned").version == 1


def test_a_killed_fetch_leaves_nothing_behind(
    team: Team,
    ann: Person,
    registry: Registry,
    make_release: MakeRelease,
    tmp_path: Path,
) -> None:
    release, out = make_release(), tmp_path / "fetched" / "out"
    registries.publish(registry, release, "taken")
    team.relay.reset()
    assert ann.run("fetch", "taken/1", out).code == 0
    downloads = sum(one.startswith(DOWNLOAD) for one in team.relay.seen)
    shutil.rmtree(out)
    ann.killed(DOWNLOAD, downloads - 1, "fetch", "taken/1", out)
    assert not out.exists()
    assert ann.run("fetch", "taken/1", out).code == 0
    assert contents(out) == contents(release)
    assert os.listdir(out.parent) == ["out"]


# --- damage ----------------------------------------------------------------------------------------


def test_a_bit_flipped_in_the_object_store(
    team: Team,
    ann: Person,
    registry: Registry,
    make_release: MakeRelease,
    tmp_path: Path,
) -> None:
    first, second = make_release("x"), make_release("y")  # no other test stores these
    for release in (first, second):
        registries.publish(registry, release, "damaged")
    (stored,) = team.stored((first / WEIGHTS).read_bytes())
    flip_bit(stored)
    for do, more in (("verify", ()), ("promote", ()), ("fetch", (tmp_path / "out",))):
        refused = ann.run(do, "damaged/1", *more)
        assert refused.code == 1
        assert WEIGHTS in refused.said.splitlines()[-1], refused.said
    assert not (tmp_path / "out").exists()
    assert aliases(registry, "damaged") == {"candidate": 2}
    assert ann.run("promote", "damaged").said["version"] == 2
