"""Schedules, approvals, dead workers and notifications on a real Prefect server, with the repository's files.

One server for all; the tests go on from what those before them left, as nights do: a run is killed, and the next one
takes over and publishes.
"""

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from pathlib import Path
from uuid import uuid4

import httpx
import pytest
import yaml

from numprune.serving import registry as registries
from numprune.serving.registry import Registry
from tests.flows.orchestration import Json, Prefect
from tests.serving.conftest import (  # noqa: F401 - fixtures
    _empty_registry,
    make_release,
    registry,
    report_json,
    workspace,
)
from tests.serving.team import databases, postgresql

pytestmark = pytest.mark.slow

NIGHTLY, RELEASE = "numprune-optimize/nightly", "numprune-release/release"
NAME = "tiny-llama"
SILENT_S = 15  # in place of the automations' minutes


@pytest.fixture(scope="module")
def folder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model, text and two recipes, the second with an impossible gate."""
    made = tmp_path_factory.mktemp("schedule")
    shutil.copytree(tiny, made / "tiny")
    recipe = (made / "tiny" / "recipe.toml").read_text()
    (made / "tiny" / "strict.toml").write_text(recipe.replace("max = 0.95", "max = 0.05"))
    return made


@pytest.fixture(scope="module")
def prefect(folder: Path) -> Iterator[Prefect]:
    nightly = {"recipe_path": str(folder / "tiny" / "recipe.toml"), "workspace": str(folder / "workspace")}
    with databases(postgresql(), "prefect") as server:
        database = f"postgresql+asyncpg://mlflow@127.0.0.1:{server.port}/prefect"
        started = Prefect(folder / "prefect", database, {"nightly": nightly, "release": {}})
        try:
            started.shell("prefect work-pool create gpu --type process")
            started.shell("prefect work-pool set-concurrency-limit gpu 1")
            started.shell("prefect deploy --all")
            yield started
        finally:
            started.close()


@pytest.fixture(scope="module")
def messages(prefect: Prefect) -> Iterator[list[Json]]:
    """The messages sent by the notification block."""
    received: list[Json] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Nothing into the tests' output."""

    with HTTPServer(("127.0.0.1", 0), Receiver) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        block = (
            "from prefect.blocks.notifications import CustomWebhookNotificationBlock as Block; "
            f"print(Block(name='test', url='http://127.0.0.1:{server.server_port}', "
            "json_data={'subject': '{{subject}}', 'body': '{{body}}'}).save('numprune'))"
        )
        found = prefect.shell(f'python -c "{block}"').strip()
        prefect.shell(f"sed 's/BLOCK_ID/{found}/' flows/notifications.yaml > notifications.yaml")
        prefect.shell("prefect automation create --from-file notifications.yaml")
        yield received
        server.shutdown()


def body(prefect: Prefect, messages: list[Json], subject: str, run: str) -> str:
    """The message about the run; Prefect may send it more than once."""

    def found() -> str | None:
        return next((one["body"] for one in messages if one["subject"] == subject and run in one["body"]), None)

    return str(prefect.wait(found, 60))


def time_of(text: str) -> datetime:
    return datetime.fromisoformat(text.replace("Z", "+00:00"))


# --- the deployments ------------------------------------------------------------------------------


@pytest.mark.parametrize(("deployment", "cron"), [(NIGHTLY, "0 2 * * *"), (RELEASE, "0 8 * * 1")])
def test_the_schedule_creates_runs(prefect: Prefect, deployment: str, cron: str) -> None:
    found = prefect.deployment(deployment)
    (schedule,) = found["schedules"]
    assert (schedule["active"], schedule["schedule"]["cron"], schedule["schedule"]["timezone"]) == (True, cron, "UTC")
    minute, hour, *_ = cron.split()
    for start in map(time_of, prefect.scheduled(found["name"])):
        assert (start.minute, start.hour) == (int(minute), int(hour))
        assert cron.endswith("*") or start.weekday() == 0


def test_one_run_at_a_time(prefect: Prefect) -> None:
    pool = prefect.pool()
    assert (pool["type"], pool["concurrency_limit"]) == ("process", 1)
    nightly = prefect.deployment(NIGHTLY)
    assert nightly["work_pool_name"] == "gpu"
    assert nightly["global_concurrency_limit"]["limit"] == 1
    assert nightly["concurrency_options"]["collision_strategy"] == "CANCEL_NEW"


# --- a dead worker --------------------------------------------------------------------------------


def impatient(prefect: Prefect, taken: str) -> str:
    """The automations as they are in the repository, but for how long they wait; a file of them.

    On a busy machine a worker may take longer over a start than that, so it is for the run `taken` alone.
    """
    found = yaml.safe_load((prefect.folder / "flows" / "automations.yaml").read_text())
    silent, unstarted = (one["trigger"] for one in found["automations"])
    silent["within"] = unstarted["within"] = SILENT_S
    unstarted["match"] = {"prefect.resource.id": f"prefect.flow-run.{taken}"}
    (prefect.folder / "impatient.yaml").write_text(yaml.safe_dump(found))
    return "impatient.yaml"


def make_run(prefect: Prefect) -> str:
    """A run of the release flow that no worker takes."""
    return str(prefect.ask("/flow_runs/", flow_id=prefect.deployment(RELEASE)["flow_id"])["id"])


def put(prefect: Prefect, run: str, state: Json) -> None:
    assert prefect.ask(f"/flow_runs/{run}/set_state", state=state, force=True)["status"] == "ACCEPT"


def beat(prefect: Prefect, run: str) -> None:
    """The heartbeat that Prefect's engine sends of a run."""
    flow = {"prefect.resource.id": "prefect.flow.1", "prefect.resource.role": "flow"}
    event = {
        "id": str(uuid4()),
        "event": "prefect.flow-run.heartbeat",
        "occurred": datetime.now(UTC).isoformat(),
        "resource": {"prefect.resource.id": f"prefect.flow-run.{run}"},
        "related": [{**flow, "prefect.resource.name": "numprune-release"}],
    }
    answer = httpx.post(f"{prefect.url}/events", json=[event], timeout=60)
    assert answer.is_success, answer.text


def test_only_the_run_of_a_dead_worker_crashes(prefect: Prefect, messages: list[Json]) -> None:
    alive, waiting, taken = (make_run(prefect) for _ in range(3))
    prefect.shell(f"prefect automation create --from-file {impatient(prefect, taken)}")
    put(prefect, taken, {"type": "PENDING"})
    for run in (alive, waiting):
        put(prefect, run, {"type": "RUNNING"})
        beat(prefect, run)
    put(prefect, waiting, {"type": "PAUSED", "name": "Suspended"})

    prefect.start_worker()
    killed = prefect.run(NIGHTLY)

    def begun() -> bool:
        beat(prefect, alive)
        return prefect.state(killed)["type"] == "RUNNING" and bool(prefect.heartbeats(killed))

    prefect.wait(begun, 120)
    prefect.kill_worker()
    assert prefect.state(killed)["type"] == "RUNNING"
    assert prefect.deployment(NIGHTLY)["global_concurrency_limit"]["active_slots"] == 1  # no place for another

    def crashed() -> bool:
        beat(prefect, alive)
        return prefect.state(killed)["type"] == "CRASHED"

    prefect.wait(crashed, 120)
    assert prefect.state(killed)["message"].startswith("no heartbeat for 90 seconds")
    assert prefect.deployment(NIGHTLY)["global_concurrency_limit"]["active_slots"] == 0
    assert prefect.wait_for(taken, "CRASHED")["message"].startswith("not started 10 minutes after")
    assert prefect.state(alive)["type"] == "RUNNING"
    assert prefect.state(waiting)["name"] == "Suspended"
    told = body(prefect, messages, "numprune-optimize: Crashed", killed)
    assert told.startswith("no heartbeat for 90 seconds")

    for run in (alive, waiting):
        put(prefect, run, {"type": "CANCELLED"})
    prefect.forget_automations("crashed")
    prefect.shell("prefect automation create --from-file flows/automations.yaml")


# --- a night --------------------------------------------------------------------------------------


def test_a_nightly_run_publishes_and_runs_never_overlap(prefect: Prefect, folder: Path) -> None:
    """From now on every minute instead of every day."""
    prefect.start_worker()
    now = datetime.now(UTC) + timedelta(seconds=6)
    schedule = f"--interval 60 --anchor-date {now:%Y-%m-%dT%H:%M:%SZ}"
    prefect.shell(f"prefect deployment schedule create {NIGHTLY} {schedule} --replace --accept-yes")

    def nights(*states: str) -> list[Json]:
        return [one for one in prefect.runs("nightly") if one["auto_scheduled"] and one["state_type"] in states]

    prefect.wait(lambda: nights("RUNNING", "COMPLETED"), 180)
    by_hand = prefect.run(NIGHTLY)
    assert prefect.wait_for(by_hand, "CANCELLED")["message"] == "Deployment concurrency limit reached."

    def published() -> Json | None:
        failed = nights("FAILED", "CRASHED")
        for one in failed:
            assert "invalid environment" in one["state"]["message"], f"{one['state']}\n{prefect.log()}"
        if len(failed) > 2:
            pytest.skip(f"nothing can be measured on this machine now: {failed[-1]['state']['message']}")
        return next(iter(nights("COMPLETED")), None)

    try:
        night = prefect.wait(published, 600)
    finally:
        prefect.shell(f"prefect deployment schedule clear {NIGHTLY} --accept-yes")
    prefect.wait(lambda: not nights("PENDING", "RUNNING"), 240)  # the next, had its minute come already
    assert night["state"]["message"] == "published tiny/1"
    opened = registries.open_registry(None, folder / "workspace")
    assert registries.verify(opened, "tiny@candidate").reference == "tiny/1"

    ran = sorted(nights("COMPLETED", "FAILED"), key=lambda one: str(one["start_time"]))
    for first, second in pairwise(ran):
        assert time_of(first["end_time"]) <= time_of(second["start_time"])


def test_a_nightly_run_that_fails_its_gate_is_announced(prefect: Prefect, messages: list[Json], folder: Path) -> None:
    prefect.start_worker()
    run = prefect.run(NIGHTLY, recipe_path=str(folder / "tiny" / "strict.toml"))
    failed = prefect.wait_for(run, "FAILED")
    assert "sizes.parameters.ratio" in failed["message"] or "invalid environment" in failed["message"]
    assert body(prefect, messages, "numprune-optimize: Failed", run).startswith(failed["message"])


# --- an approval ----------------------------------------------------------------------------------


def production(registry: Registry) -> list[str]:  # noqa: F811
    return [one.reference for one in registries.list_versions(registry, NAME) if "production" in one.aliases]


def test_a_release_waits_for_approval(
    prefect: Prefect,
    messages: list[Json],
    registry: Registry,  # noqa: F811
    workspace: Path,  # noqa: F811
    make_release: Callable[..., Path],  # noqa: F811
) -> None:
    prefect.start_worker()
    registries.publish(registry, make_release("a"), NAME)
    parameters = {"reference": NAME, "workspace": str(workspace), "rollout": False}

    late = prefect.run(RELEASE, **parameters, approval_hours=1 / 3600)
    assert prefect.wait_for(late, "FAILED")["message"] == "The flow was paused and never resumed."
    assert prefect.resume(late, approved=True, by="ada") != "ACCEPT"

    asked = prefect.run(RELEASE, **parameters)
    prefect.wait_for(asked, "Suspended")
    assert body(prefect, messages, "numprune-release waits for your word", asked)
    assert production(registry) == []
    assert prefect.resume(asked, approved=False, by="ada", comment="not on a Friday") == "ACCEPT"
    refused = prefect.wait_for(asked, "FAILED")["message"]
    assert refused == f"{NAME}/1: refused by ada: not on a Friday"
    assert body(prefect, messages, "numprune-release: Failed", asked).startswith(refused)
    (event,) = prefect.events("numprune.release.refused")
    assert event["resource"]["prefect.resource.name"] == f"{NAME}/1"
    assert production(registry) == []

    asked = prefect.run(RELEASE, **parameters)
    prefect.wait_for(asked, "Suspended")
    assert prefect.resume(asked, approved=True, by="ada") == "ACCEPT"
    prefect.wait_for(asked, "COMPLETED")
    assert production(registry) == [f"{NAME}/1"]
    (event,) = prefect.events("numprune.release.in-production")
    assert event["payload"]["approval"]["by"] == "ada"
    expected = {"subject": f"{NAME}/1 is in production", "body": "approved by ada"}
    prefect.wait(lambda: expected in messages, 60)
