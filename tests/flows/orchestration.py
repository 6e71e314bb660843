"""A Prefect server and worker for one test, set up by the README's commands from a copy of the deployments."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

ROOT = Path(__file__).parents[2]
ENDED = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}

Json = dict[str, Any]


class Prefect:
    """A server, with prefect.yaml beside it whose parameters are the test's, and a worker when it is asked for.

    On PostgreSQL: on SQLite a busy server finds its database locked, and gives up events and what they are to set off.
    """

    def __init__(self, folder: Path, database: str, parameters: dict[str, Json]) -> None:
        self.folder = folder
        shutil.copytree(ROOT / "flows", folder / "flows", ignore=shutil.ignore_patterns("__pycache__", "embedded"))
        deployments = yaml.safe_load((ROOT / "prefect.yaml").read_text())
        for one in deployments["deployments"]:
            one["parameters"] |= parameters[one["name"]]
        (folder / "prefect.yaml").write_text(yaml.safe_dump(deployments))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/api"
        services = "PREFECT_SERVER_SERVICES"
        self._environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PREFECT_HOME": str(folder / "home"),
            "PREFECT_API_URL": self.url,
            "PREFECT_CLI_PROMPT": "false",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": database,
            "PREFECT_SERVER_DATABASE_TIMEOUT": "60",  # should the machine be busy
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            f"{services}_SCHEDULER_LOOP_SECONDS": "1",
            f"{services}_LATE_RUNS_LOOP_SECONDS": "1",
            f"{services}_LATE_RUNS_AFTER_SECONDS": "2",
            f"{services}_PAUSE_EXPIRATIONS_LOOP_SECONDS": "1",
            "PREFECT_SERVER_EVENTS_PROACTIVE_GRANULARITY": "PT1S",
            "DO_NOT_TRACK": "1",
        }
        self._log = (folder / "log.txt").open("w+")
        self._server = self._start(f"prefect server start --host 127.0.0.1 --port {port}")
        self._worker: subprocess.Popen[str] | None = None
        self.wait(lambda: self._get("/health") is True, 240)

    # --- commands -------------------------------------------------------------------------------

    def shell(self, command: str) -> str:
        """Run a line of the README; return its output."""
        done = subprocess.run(
            ["/bin/sh", "-ec", command],
            cwd=self.folder,
            env=self._environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
        )
        assert done.returncode == 0, f"{command}: {done.stdout} {done.stderr}\n{self.log()}"
        return done.stdout

    def start_worker(self) -> None:
        """Start a worker if there is none."""
        if self._worker is None or self._worker.poll() is not None:
            self._worker = self._start("prefect worker start --pool gpu")

    def kill_worker(self) -> None:
        """Kill the worker and everything that it runs with kill -9."""
        assert self._worker is not None
        worker = psutil.Process(self._worker.pid)
        for process in [worker, *worker.children(recursive=True)]:
            process.kill()
        self._worker.wait()

    def close(self) -> None:
        if self._worker is not None and self._worker.poll() is None:
            self.kill_worker()
        self._server.kill()
        self._server.wait()
        self._log.close()

    # --- questions ------------------------------------------------------------------------------

    def ask(self, path: str, **body: Any) -> Any:
        """The server's answer to a POST."""
        deadline = time.monotonic() + 60
        while True:
            answer = httpx.post(f"{self.url}{path}", json=body, timeout=60)
            if answer.status_code != 503 or time.monotonic() > deadline:
                break
            time.sleep(1)  # its SQLite is locked by another of its services; Prefect's own client asks again, too
        assert answer.is_success, answer.text
        return answer.json() if answer.content else None

    def deployment(self, name: str) -> Json:
        return dict(self.wait(lambda: self._get(f"/deployments/name/{name}"), 60))

    def pool(self) -> Json:
        return dict(self.wait(lambda: self._get("/work_pools/gpu"), 60))

    def run(self, deployment: str, **parameters: Any) -> str:
        """Create a run; return its id."""
        found = self.deployment(deployment)
        return str(self.ask(f"/deployments/{found['id']}/create_flow_run", parameters=parameters)["id"])

    def state(self, run: str) -> Json:
        return dict(self.wait(lambda: self._get(f"/flow_runs/{run}"), 60)["state"])

    def wait_for(self, run: str, state: str) -> Json:
        """Wait until the run is in the state, and return it. Fails at once if the run ends in another."""

        def reached() -> Json | None:
            found = self.state(run)
            assert found["type"] not in ENDED - {state}, f"{found}\n{self.log()}"
            return found if state in (found["type"], found["name"]) else None

        return dict(self.wait(reached, 240))

    def runs(self, deployment: str) -> list[Json]:
        """All runs of a deployment that are due."""
        asked = {"deployments": {"name": {"any_": [deployment]}}, "sort": "EXPECTED_START_TIME_ASC"}
        return [one for one in self.ask("/flow_runs/filter", **asked) if one["state_name"] != "Scheduled"]

    def scheduled(self, deployment: str) -> list[str]:
        """When the runs created by its schedule will begin."""
        asked = {
            "deployments": {"name": {"any_": [deployment]}},
            "flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}},
        }
        return [one["expected_start_time"] for one in self.wait(lambda: self.ask("/flow_runs/filter", **asked), 120)]

    def resume(self, run: str, **answer: Any) -> str:
        """The server's answer: ACCEPT, or another."""
        return str(self.ask(f"/flow_runs/{run}/resume", run_input=answer)["status"])

    def events(self, event: str) -> list[Json]:
        """Events of this name, which are stored a moment after they are sent."""
        return list(self.wait(lambda: self._events(event={"name": [event]}), 60))

    def heartbeats(self, run: str) -> list[Json]:
        """The run's heartbeats that are stored so far."""
        of_run = {"id": [f"prefect.flow-run.{run}"]}
        return self._events(event={"name": ["prefect.flow-run.heartbeat"]}, resource=of_run)

    def forget_automations(self, word: str) -> None:
        """Delete the automations whose name contains the word."""
        for one in self.ask("/automations/filter"):
            if word in one["name"]:
                httpx.delete(f"{self.url}/automations/{one['id']}", timeout=60).raise_for_status()

    def log(self) -> str:
        self._log.seek(0)
        return self._log.read()[-8000:]

    def wait(self, reached: Callable[[], Any], seconds: float) -> Any:
        deadline = time.monotonic() + seconds
        while not (found := reached()):
            assert self._server.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.3)
        return found

    # --- details --------------------------------------------------------------------------------

    def _start(self, command: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            command.split(),
            cwd=self.folder,
            env=self._environment,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def _events(self, **filters: Json) -> list[Json]:
        return list(self.ask("/events/filter", filter=filters)["events"])

    def _get(self, path: str) -> Any:
        try:
            answer = httpx.get(f"{self.url}{path}", timeout=60)
        except httpx.TransportError:
            return None
        return answer.json() if answer.is_success else None
