"""The release flow on a real Prefect server, deployed from prefect.yaml, run by a process worker."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from numprune.serving import registry as registries
from numprune.serving.registry import Registry
from tests.serving.conftest import report_json  # noqa: F401 - fixtures
from tests.serving.test_registry import _empty_registry, make_release, registry, workspace  # noqa: F401 - fixtures

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
NAME = "tiny-llama"


class Prefect:
    """A server and a worker of their own, with the deployments of prefect.yaml."""

    def __init__(self, home: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/api"
        self._environment = {
            **os.environ,
            "PREFECT_HOME": str(home),
            "PREFECT_API_URL": self.url,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "DO_NOT_TRACK": "1",
        }
        self._log = (home / "log.txt").open("w+")
        self._processes = [self._start("server", "start", "--host", "127.0.0.1", "--port", str(port))]
        self._wait(lambda: self._get("/health") is True, 240)
        self.command("work-pool", "create", "gpu", "--type", "process")
        self.command("--no-prompt", "deploy", "--all")
        self._processes.append(self._start("worker", "start", "--pool", "gpu"))

    def command(self, *arguments: str) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "prefect", *arguments],
            cwd=ROOT,
            env=self._environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def ask(self, path: str, **body: Any) -> Any:
        deadline = time.monotonic() + 60
        while True:
            answer = httpx.post(f"{self.url}{path}", json=body, timeout=60)
            if answer.status_code != 503 or time.monotonic() > deadline:
                break
            time.sleep(1)  # its SQLite is locked by another of its services; Prefect's own client asks again, too
        assert answer.is_success, answer.text
        return answer.json() if answer.content else None

    def run(self, deployment: str, **parameters: Any) -> str:
        """Have a run made; its id."""
        found = self._wait(lambda: self._get(f"/deployments/name/{deployment}"), 60)
        return str(self.ask(f"/deployments/{found['id']}/create_flow_run", parameters=parameters)["id"])

    def wait_for(self, run_id: str, state: str) -> dict[str, Any]:
        """Wait until the run is in the state. Fails at once when it ends in another."""

        def reached() -> dict[str, Any] | None:
            found: dict[str, Any] = self._get(f"/flow_runs/{run_id}")
            ended = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"} - {state}
            assert found["state"]["type"] not in ended, f"{found['state']}\n{self.log()}"
            return found if state in (found["state"]["type"], found["state"]["name"]) else None

        return self._wait(reached, 240)

    def resume(self, run_id: str, **answer: Any) -> None:
        assert self.ask(f"/flow_runs/{run_id}/resume", run_input=answer)["status"] == "ACCEPT"

    def scheduled(self, deployment: str) -> int:
        """How many runs its schedule has made."""
        asked = {
            "deployments": {"name": {"any_": [deployment]}},
            "flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}},
        }
        return int(self._wait(lambda: self.ask("/flow_runs/count", **asked), 120))

    def events(self, event: str) -> list[dict[str, Any]]:
        """Events of this name. They are stored a moment after they are sent."""
        asked = {"filter": {"event": {"name": [event]}}}
        return list(self._wait(lambda: self.ask("/events/filter", **asked)["events"], 60))

    def log(self) -> str:
        self._log.seek(0)
        return self._log.read()[-8000:]

    def close(self) -> None:
        for process in reversed(self._processes):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self._log.close()

    def _start(self, *arguments: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", "prefect", *arguments],
            cwd=ROOT,
            env=self._environment,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def _get(self, path: str) -> Any:
        try:
            answer = httpx.get(f"{self.url}{path}", timeout=60)
        except httpx.TransportError:
            return None
        return answer.json() if answer.is_success else None

    def _wait(self, reached: Callable[[], Any], seconds: float) -> Any:
        deadline = time.monotonic() + seconds
        while not (found := reached()):
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.5)
        return found


@pytest.fixture(scope="module")
def prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prefect]:
    started = Prefect(tmp_path_factory.mktemp("prefect"))
    yield started
    started.close()


@pytest.mark.parametrize("deployment", ["nightly", "release"])
def test_the_schedule_makes_runs(prefect: Prefect, deployment: str) -> None:
    assert prefect.scheduled(deployment) > 0


def production(registry: Registry) -> list[int]:  # noqa: F811
    return [one.version for one in registries.list_versions(registry, NAME) if "production" in one.aliases]


def test_a_release_waits_for_somebody_s_word(
    prefect: Prefect,
    registry: Registry,  # noqa: F811
    workspace: Path,  # noqa: F811
    make_release: Callable[..., Path],  # noqa: F811
) -> None:
    registries.publish(registry, make_release("a"), NAME)
    parameters = {"reference": NAME, "workspace": str(workspace), "rollout": False}

    asked = prefect.run("numprune-release/release", **parameters)
    prefect.wait_for(asked, "Suspended")
    assert production(registry) == []
    prefect.resume(asked, approved=True, by="ada")
    prefect.wait_for(asked, "COMPLETED")
    assert production(registry) == [1]
    (event,) = prefect.events("numprune.release.in-production")
    assert event["resource"]["prefect.resource.name"] == f"{NAME}/1"
    assert event["payload"]["approval"]["by"] == "ada"

    registries.publish(registry, make_release("b"), NAME)
    asked = prefect.run("numprune-release/release", **parameters)
    prefect.wait_for(asked, "Suspended")
    prefect.resume(asked, approved=False, by="ada", comment="not on a Friday")
    failed = prefect.wait_for(asked, "FAILED")
    assert failed["state"]["message"] == f"{NAME}/2: refused by ada: not on a Friday"
    assert production(registry) == [1]


@pytest.mark.vllm
def test_production_is_taken_back_from_a_release_that_cannot_be_rolled_out(
    registry: Registry,  # noqa: F811
    workspace: Path,  # noqa: F811
    make_release: Callable[..., Path],  # noqa: F811
) -> None:
    from numprune.flows.release import release

    registries.publish(registry, make_release("a"), NAME)
    registries.promote(registry, NAME)
    registries.publish(registry, make_release("b"), NAME)  # whose weights are none
    state = release(NAME, str(workspace), approval=False, return_state=True)
    assert state.is_failed()
    assert state.message.startswith(f"{NAME}/2: {NAME}: ")
    assert "nothing serves" in state.message
    assert production(registry) == [1]


def test_without_a_deployment_nobody_can_be_asked(
    registry: Registry,  # noqa: F811
    workspace: Path,  # noqa: F811
    make_release: Callable[..., Path],  # noqa: F811
) -> None:
    from numprune.errors import InputError
    from numprune.flows.release import release

    registries.publish(registry, make_release("a"), NAME)
    with pytest.raises(InputError, match="or say approval=false"):
        release(NAME, str(workspace), rollout=False)
    assert production(registry) == []

    registries.promote(registry, NAME)  # what is in production already needs nobody's word
    state = release(NAME, str(workspace), rollout=False, return_state=True)
    assert (state.is_completed(), state.message) == (True, f"{NAME}/1 is in production")
