"""Rollouts interrupted at every step, with the real router and tiny servers behind it."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from numprune.errors import InputError, IntegrityError, MissingRuntime
from numprune.serving import rollout
from numprune.serving.deployment import Deployment
from numprune.serving.rollout import RolloutBusy, RolloutFailed, Settings, router, swap
from numprune.serving.rollout import backend as backends
from numprune.serving.rollout.recovery import recover
from numprune.serving.rollout.state import Backend, Place, Started, State
from numprune.serving.vllm import process, server
from numprune.serving.vllm.environment import Environment
from numprune.serving.vllm.process import kill_tagged, tagged
from tests.serving.releases import require_vllm

NAME = "tiny"

# Speaks what the rollout asks of a server: /health, /v1/models, /metrics, and a completion that takes `seconds`. As in
# vLLM, $VLLM_API_KEY guards /v1.
STAND_IN = """
import json, os, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
port, model = int(sys.argv[1]), sys.argv[2]
pending = []
class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *_): pass
    def answer(self, text):
        key = os.environ.get("VLLM_API_KEY")
        refused = key and self.path.startswith("/v1") and self.headers["authorization"] != f"Bearer {key}"
        self.send_response(401 if refused else 200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())
    def do_GET(self):
        if self.path == "/metrics":
            running = f'vllm:num_requests_running{{engine="0",model_name="m"}} {len(pending)}.0'
            return self.answer(running + '\\nvllm:num_requests_waiting{engine="0"} 0.0\\n')
        self.answer(json.dumps({"data": [{"id": model}]}))
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        pending.append(1)
        time.sleep(asked.get("seconds", 0))
        pending.pop()
        self.answer(json.dumps({"port": port}))
ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path, NAME)
    yield made
    for _, tag in list(tagged(made.tag_prefix)):
        kill_tagged(tag)


@pytest.fixture
def settings() -> Settings:
    return Settings(require_vllm(), drain_timeout_s=20.0)


def wait(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def start(place: Place, reference: str, model: str = NAME, key: str = "") -> Backend:
    port = server.free_port()
    running = process.start(
        [sys.executable, "-c", STAND_IN, str(port), model],
        tag=f"{place.tag_prefix}server-{reference.replace('/', '-')}",
        log=place.workspace / f"{reference.replace('/', '-')}.log",
        detached=True,
        env={"VLLM_API_KEY": key},
    )
    made = Backend(
        reference=reference,
        digest=reference[-1] * 64,
        url=f"http://127.0.0.1:{port}",
        dtype="auto",
        options=[],
        started=Started.of(running),
    )
    wait(lambda: backends.is_healthy(made), "the stand-in answers")
    return made


def serve(place: Place, settings: Settings, blue: Backend) -> State:
    """A router in front of `blue`, as a finished rollout leaves it."""
    made = router.start(place, settings, "127.0.0.1", server.free_port(), blue.url)
    return place.write(State(name=NAME, router=made, current=blue))


def ask(state: State, seconds: float = 0.0) -> str:
    """Which server answered a request to the public address."""
    assert state.router is not None
    body = {"model": NAME, "prompt": "x", "seconds": seconds}
    answer = httpx.post(f"{state.router.url}/v1/completions", json=body, timeout=30.0)
    assert answer.status_code == 200, answer.text
    return f"http://127.0.0.1:{answer.json()['port']}"


def running(place: Place) -> set[str]:
    return {tag for _, tag in tagged(place.tag_prefix)}


# --- interrupted, and run again --------------------------------------------------------------------


@pytest.mark.vllm
@pytest.mark.parametrize("step", ["nothing switched", "green added", "blue removed"])
def test_an_interrupted_switch_is_completed_without_losing_requests(
    place: Place, settings: Settings, step: str
) -> None:
    blue, green = start(place, "tiny/1"), start(place, "tiny/2")
    state = serve(place, settings, blue)
    assert state.router is not None
    state = place.write(state.model_copy(update={"current": green, "retiring": blue}))
    if step != "nothing switched":
        httpx.post(f"{state.router.url}/add_worker", params={"url": green.url}, timeout=60)
    answers: list[str] = []
    slow = [threading.Thread(target=lambda: answers.append(ask(state, 3.0))) for _ in range(4)]
    for thread in slow:
        thread.start()
    wait(lambda: backends._pending(blue) + backends._pending(green) + len(answers) >= 4, "all requests have arrived")
    if step == "blue removed":
        httpx.post(f"{state.router.url}/remove_worker", params={"url": blue.url}, timeout=60)

    after = recover(place, settings)

    for thread in slow:
        thread.join()
    assert len(answers) == 4
    assert blue.url in answers
    assert (after.current, after.retiring) == (green, None)
    assert place.read() == after
    assert ask(after) == green.url
    assert running(place) == after.tags()


@pytest.mark.vllm
def test_an_unproven_server_is_stopped_and_blue_keeps_serving(place: Place, settings: Settings) -> None:
    blue = start(place, "tiny/1")
    state = serve(place, settings, blue)
    start(place, "tiny/2")  # started by a rollout that was killed before it wrote anything
    assert recover(place, settings) == state
    assert running(place) == state.tags()
    assert ask(state) == blue.url


@pytest.mark.vllm
def test_a_dead_router_is_replaced_at_the_same_address(place: Place, settings: Settings) -> None:
    blue = start(place, "tiny/1")
    state = serve(place, settings, blue)
    assert state.router is not None
    os.kill(state.router.started.pid, signal.SIGKILL)
    after = recover(place, settings)
    assert after.router is not None
    assert after.router.url == state.router.url
    assert ask(after) == blue.url


@pytest.mark.vllm
@pytest.mark.parametrize("dead", ["current", "retiring"])
def test_the_surviving_server_serves(place: Place, settings: Settings, dead: str) -> None:
    blue, green = start(place, "tiny/1"), start(place, "tiny/2")
    state = place.write(serve(place, settings, blue).model_copy(update={"current": green, "retiring": blue}))
    victim, survivor = (green, blue) if dead == "current" else (blue, green)
    os.kill(victim.started.pid, signal.SIGKILL)
    after = recover(place, settings)
    assert (after.current, after.retiring) == (survivor, None)
    assert ask(after) == survivor.url
    assert after.router == state.router


@pytest.mark.vllm
def test_after_losing_everything_a_rollout_starts_over(place: Place, settings: Settings) -> None:
    blue = start(place, "tiny/1")
    state = serve(place, settings, blue)
    for tag in state.tags():
        kill_tagged(tag)
    after = recover(place, settings)
    assert (after.router, after.current, after.retiring) == (None, None, None)


@pytest.mark.vllm
def test_a_failed_switch_changes_nothing(place: Place, settings: Settings) -> None:
    blue, green = start(place, "tiny/1"), start(place, "tiny/2", model="another")
    state = serve(place, settings, blue)
    with pytest.raises(router.RouterError, match=r"serves \['another'\], not tiny"):
        swap._switch(place, settings, state, green)
    assert place.read() == state
    assert ask(state) == blue.url
    assert state.router is not None
    assert router.workers(state.router) == {blue.url}


@pytest.mark.vllm
def test_a_router_that_dies_during_a_switch_is_restored_with_blue(place: Place, settings: Settings) -> None:
    blue, green = start(place, "tiny/1"), start(place, "tiny/2")
    state = serve(place, settings, blue)
    assert state.router is not None
    os.kill(state.router.started.pid, signal.SIGKILL)
    with pytest.raises(router.RouterError, match="the router does not respond"):
        swap._switch(place, settings, state, green)
    after = place.read()
    assert after.current == blue
    assert ask(after) == blue.url


@pytest.mark.vllm
def test_requests_that_outlast_the_drain_are_counted(place: Place, settings: Settings) -> None:
    blue = start(place, "tiny/1")

    def ask_in_vain() -> None:
        with pytest.raises(httpx.TransportError):
            httpx.post(f"{blue.url}/v1/completions", json={"seconds": 60}, timeout=90)

    slow = threading.Thread(target=ask_in_vain)
    slow.start()
    wait(lambda: backends._pending(blue) == 1, "the request has arrived")
    assert backends.retire(blue, 1.0) == 1
    slow.join()
    assert not backends.is_alive(blue)


@pytest.mark.vllm
def test_status_and_stop(place: Place, settings: Settings, tmp_path: Path) -> None:
    assert rollout.status(NAME, tmp_path)["serving"] is False
    state = serve(place, settings, start(place, "tiny/1"))
    found = rollout.status(NAME, tmp_path)
    assert state.router is not None
    assert (found["serving"], found["url"], found["current"]["reference"]) == (True, state.router.url, "tiny/1")
    assert rollout.stop(NAME, tmp_path) == {"name": NAME, "stopped": ["tiny/1"]}
    assert running(place) == set()
    assert rollout.status(NAME, tmp_path)["serving"] is False
    assert rollout.stop(NAME, tmp_path)["stopped"] == []


@pytest.mark.vllm
def test_another_address_is_refused_while_it_runs(place: Place, settings: Settings, tmp_path: Path) -> None:
    blue = start(place, "tiny/1")
    state = serve(place, settings, blue)
    moved = Settings(settings.environment, port=1)
    with pytest.raises(RolloutFailed, match=r"--port 1: tiny is served at http.*--stop.*; tiny/1 keeps serving"):
        rollout.roll_out(NAME, never, tmp_path, moved)
    assert ask(state) == blue.url


@pytest.mark.vllm
def test_a_version_that_already_serves_is_left_alone(place: Place, settings: Settings, tmp_path: Path) -> None:
    blue = start(place, "tiny/1")
    state = serve(place, settings, blue)
    release = Deployment("tiny/1", NAME, 1, blue.digest, tmp_path, "float32")
    called: list[int] = []
    found = rollout.roll_out(NAME, lambda: release, tmp_path, settings, then=lambda: called.append(1))
    assert (found["changed"], found["reference"], found["pid"]) == (False, "tiny/1", blue.started.pid)
    assert called == [1]
    assert place.read() == state


@pytest.mark.vllm
def test_a_server_with_another_key_is_replaced(place: Place, settings: Settings, tmp_path: Path) -> None:
    blue = start(place, "tiny/1", key="old")
    place.write(serve(place, settings, blue).model_copy(update={"guarded": True}))
    release = Deployment("tiny/1", NAME, 1, blue.digest, tmp_path / "gone", "float32")
    same, changed = (Settings(settings.environment, api_key=key) for key in ("old", "new"))
    assert rollout.roll_out(NAME, lambda: release, tmp_path, same)["changed"] is False
    with pytest.raises(RolloutFailed, match=r"gone/checkpoint/config\.json: cannot be read"):  # it is to be started
        rollout.roll_out(NAME, lambda: release, tmp_path, changed)
    for blue_lives in (True, False):
        with pytest.raises(RolloutFailed, match=r"is served with an API key; give one with \$VLLM_API_KEY or"):
            rollout.roll_out(NAME, never, tmp_path, settings)
        assert backends.is_alive(blue) == blue_lives
        blue.started.process.stop()


def test_the_key_of_a_server_is_recognized(place: Place) -> None:
    guarded, open_to_all = start(place, "tiny/1", key="old"), start(place, "tiny/2")
    keys = ("old", "new", None)
    assert [backends.takes_key(guarded, key) for key in keys] == [True, False, False]
    assert [backends.takes_key(open_to_all, key) for key in keys] == [False, False, True]


@pytest.mark.parametrize("part", ["current", "retiring"])
def test_the_temporary_folder_of_a_server_that_died_is_removed(place: Place, part: str) -> None:
    dead = start(place, "tiny/1")
    scratch = process._scratch(dead.started.tag)
    place.write(State(name=NAME).model_copy(update={part: dead}))
    os.kill(dead.started.pid, signal.SIGKILL)
    wait(lambda: not backends.is_alive(dead), "it ends")
    assert scratch.exists()
    after = recover(place, Settings(NO_ROUTER))
    assert (after.current, after.retiring) == (None, None)
    assert not scratch.exists()


def test_the_temporary_folder_of_a_server_that_died_while_starting_is_removed(place: Place) -> None:
    dead = start(place, "tiny/1")
    scratch = process._scratch(dead.started.tag)
    other = process._scratch("numprune:another")
    other.mkdir()
    (other / process._TAG_FILE).write_text("numprune:another")
    os.kill(dead.started.pid, signal.SIGKILL)
    wait(lambda: not backends.is_alive(dead), "it ends")
    recover(place, Settings(NO_ROUTER))  # the state says nothing of it
    assert not scratch.exists()
    assert other.exists()


# --- without a server ------------------------------------------------------------------------------


def never() -> Deployment:
    raise AssertionError("nothing may be prepared")


NO_ROUTER = Environment(Path(sys.executable), "0.32.0", True, None, None)


def test_a_concurrent_rollout_is_refused(place: Place, tmp_path: Path) -> None:
    script = """
import sys, time
from pathlib import Path
from numprune.serving.rollout.state import Place
with Place(Path(sys.argv[1]), "tiny").exclusive():
    print("held", flush=True)
    time.sleep(300)
"""
    other = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE)
    assert other.stdout is not None
    assert other.stdout.readline() == b"held\n"
    with pytest.raises(RolloutBusy, match=rf"another rollout is in progress \(process {other.pid}\)"):
        rollout.roll_out(NAME, never, tmp_path, Settings(NO_ROUTER))
    with pytest.raises(RolloutBusy):
        rollout.stop(NAME, tmp_path)
    other.send_signal(signal.SIGKILL)  # the kernel lets go of a lock, however its holder ends
    other.wait()
    other.stdout.close()
    with place.exclusive():
        pass


def test_without_the_router_nothing_is_started(place: Place, tmp_path: Path) -> None:
    with pytest.raises(RolloutFailed, match=r"vllm-router is not installed there; .*; nothing serves") as raised:
        rollout.roll_out(NAME, never, tmp_path, Settings(NO_ROUTER))
    assert raised.value.exit_code == 2
    assert isinstance(raised.value.__cause__, MissingRuntime)


def test_a_damaged_state_is_refused(place: Place, tmp_path: Path) -> None:
    place.write(State(name=NAME))
    assert place.read() == State(name=NAME)
    (place.folder / "state.json").write_text('{"schema": "numprune/rollout/1", "name": "tiny", "current": {}}')
    with pytest.raises(IntegrityError, match=r"state\.json: current\..*--stop"):
        place.read()
    installed = Environment(Path(sys.executable), "0.32.0", True, None, "0.1.17")
    with pytest.raises(RolloutFailed, match=r"state\.json: current.*; it is unknown which version serves"):
        rollout.roll_out(NAME, never, tmp_path, Settings(installed))
    rollout.stop(NAME, tmp_path)
    assert place.read() == State(name=NAME)


def test_a_name_cannot_leave_the_workspace(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        Place(tmp_path, "../tiny")


def test_names_and_workspaces_are_isolated(tmp_path: Path) -> None:
    prefixes = {Place(tmp_path / folder, name).tag_prefix for folder in ("a", "b") for name in ("tiny", "tiny-2")}
    assert len(prefixes) == 4
    assert not any(one != other and one.startswith(other) for one in prefixes for other in prefixes)
