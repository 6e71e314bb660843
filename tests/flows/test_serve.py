"""`numprune serve`, `rollout` and `rollback` with real vLLM servers, as scripts and people use them.

What is served is the embedded model, pruned: version 1 with a uniform shape on stock vLLM, version 2 with a shape per
layer through the plug-in.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch

from numprune.flows import embedded
from numprune.flows.work.prune import prune_checkpoint
from numprune.pruning import PruneOptions
from numprune.serving import canary, registry, rollout
from numprune.serving.rollout.state import Place
from numprune.serving.vllm.process import TAG, kill_tagged, tagged
from numprune.serving.vllm.server import free_port
from tests.flows.conftest import Answered
from tests.serving.releases import SMALL, make_release, publish, require_vllm

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

NAME = "embedded"
SERVED = ("--dtype", "float32")  # in which a server must agree with transformers to 1e-3
WAIT_S = 240
BEGUN: list["subprocess.Popen[str]"] = []


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two versions, the second in production after the first."""
    require_vllm()
    folder = tmp_path_factory.mktemp("deploy")
    base = Path(embedded.__file__).parent / "model"
    rows = torch.randint(0, 4096, (8, 64), generator=torch.Generator().manual_seed(0))
    for allocation in ("uniform", "global"):
        options = PruneOptions(ratio=0.3, allocation=allocation, compensation="oneshot")
        prune_checkpoint(base, rows, options, folder / allocation, torch.device("cpu"))
        publish(make_release(folder / allocation, folder / f"release {allocation}"), folder / "w", NAME)
    kinds = [json.loads((folder / kind / "config.json").read_text())["model_type"] for kind in ("uniform", "global")]
    assert [kind.startswith("numprune_") for kind in kinds] == [False, True]
    yield folder / "w"
    for process in BEGUN:
        process.kill()  # those of a test that failed; the others have ended
        process.wait()
    rollout.stop(NAME, folder / "w")
    for _, tag in list(tagged(Place(folder / "w", NAME).tag_prefix)):
        kill_tagged(tag)


def begin(workspace: Path, command: str, *arguments: object, options: Sequence[str] = SMALL) -> "subprocess.Popen[str]":
    """A command that starts servers, in a process of its own."""
    words = [command, *map(str, arguments), "--workspace", str(workspace), "--json", "--", *options]
    BEGUN.append(
        subprocess.Popen(
            [sys.executable, "-m", "numprune.flows.cli", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    )
    return BEGUN[-1]


def end(process: "subprocess.Popen[str]") -> Answered:
    out, err = process.communicate(timeout=WAIT_S)
    return Answered(process.returncode, out, err)


def run(workspace: Path, command: str, *arguments: object, options: Sequence[str] = SMALL) -> Answered:
    return end(begin(workspace, command, *arguments, options=options))


def wait(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + WAIT_S
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.3)
    return found


def below(pid: int) -> list[psutil.Process]:
    """The server that a command started, with its children: those whose environment has a tag."""
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.Error):
            found += [child] if TAG in child.environ() else []
    return found


def gone(processes: list[psutil.Process]) -> bool:
    return not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in processes)


# --- serve -----------------------------------------------------------------------------------------


def test_serve_until_it_is_told_to_stop(workspace: Path) -> None:
    port = free_port()
    serving = begin(workspace, "serve", f"{NAME}@production", "--port", port, *SERVED)
    assert serving.stdout is not None
    assert serving.stderr is not None
    text = ""
    while "}\n" not in text or text.count("{") != text.count("}"):
        line = serving.stdout.readline()
        assert line, serving.stderr.read()
        text += line
    ready = json.loads(text)
    assert (ready["reference"], ready["url"], ready["dtype"]) == ("embedded/2", f"http://127.0.0.1:{port}", "float32")
    assert ready["canary"]["worst"]["error"] <= 1e-3
    assert ready["canary"]["greedy_match"] == 1.0
    body = {"model": NAME, "prompt": "Hello", "max_tokens": 3}
    assert httpx.post(f"{ready['url']}/v1/completions", json=body, timeout=60).status_code == 200

    refused = run(workspace, "serve", NAME, "--port", port)
    assert refused.code == 1
    assert f"--port {port}: cannot be used on 127.0.0.1 (Address already in use)" in refused.err

    servers = below(serving.pid)
    assert len(servers) >= 2  # the API and the engine at least
    serving.send_signal(signal.SIGTERM)
    stopped = end(serving)
    assert (stopped.code, stopped.out) == (0, "")
    assert "canary passed in float32" in stopped.err
    assert "Traceback" not in stopped.err
    assert gone(servers)


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_nothing_stays_of_a_serve_that_is_ended_while_vllm_starts(workspace: Path, sent: signal.Signals) -> None:
    serving = begin(workspace, "serve", NAME, "--port", free_port())
    servers = wait(lambda: len(found := below(serving.pid)) >= 2 and found, "the engine's process is there")
    serving.send_signal(sent)
    started = time.monotonic()
    ended = end(serving)
    assert ended.code == (-signal.SIGKILL if sent == signal.SIGKILL else 130)
    wait(lambda: gone(servers), "vLLM has ended")
    assert time.monotonic() - started < 25


def test_without_vllm_the_install_line_is_given(workspace: Path, tmp_path: Path) -> None:
    refused = run(workspace, "serve", NAME, "--vllm", tmp_path / "none")
    assert refused.code == 1
    assert refused.err.startswith("numprune: error: ")
    assert refused.err.count("\n") == 1
    assert "make env-vllm" in refused.err


# --- rollout and rollback --------------------------------------------------------------------------


@dataclass
class Traffic:
    """Requests to the public address, one after the other in each of two threads, until the block is left."""

    url: str
    expected: dict[tuple[int, ...], str]  # greedy tokens -> which version gives them
    prompt: list[int]
    failures: list[str] = field(default_factory=list)
    answered: list[str] = field(default_factory=list)  # by which version, in order
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> "Traffic":
        self._threads = [threading.Thread(target=self._ask) for _ in range(2)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self) -> None:
        length = len(next(iter(self.expected)))
        body = {
            "model": NAME,
            "prompt": self.prompt,
            "max_tokens": length,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        while not self._stop.is_set():
            try:
                answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=120)
                tokens = tuple(answer.json()["choices"][0]["token_ids"])
                self.answered.append(self.expected[tokens])
            except Exception as error:
                self.failures.append(f"{type(error).__name__}: {error}")
            time.sleep(0.5)  # two cores: what is started needs them too


def traffic(workspace: Path, url: str) -> Traffic:
    """Each answer must be, token by token, that of one of the two versions."""
    folders = [workspace.parent / f"release {kind}" for kind in ("uniform", "global")]
    references = [canary.read(folder / canary.REFERENCE) for folder in folders]
    steps = 6
    margins = [
        min(margin for reference in references for margin in reference.prompts[number].margins[:steps])
        for number in range(len(references[0].prompts))
    ]
    number = margins.index(max(margins))
    assert margins[number] > 1e-3
    expected = {
        tuple(reference.prompts[number].greedy[:steps]): f"{NAME}/{version}"
        for version, reference in enumerate(references, start=1)
    }
    assert len(expected) == 2
    return Traffic(url, expected, references[0].prompts[number].tokens)


def production(workspace: Path) -> int:
    return registry.verify(registry.open_registry(None, workspace), NAME).version


def test_a_swap_under_load_that_is_killed_in_the_middle_and_run_again(workspace: Path) -> None:
    place = Place(workspace, NAME)
    port = free_port()
    first = run(workspace, "rollout", f"{NAME}/1", "--port", port, *SERVED)
    assert first.code == 0, first.err
    assert first.json["canary"]["worst"]["error"] <= 1e-3
    assert first.json["canary"]["greedy_match"] == 1.0
    assert first.json["url"] == f"http://127.0.0.1:{port}"
    assert (first.json["reference"], first.json["changed"], first.json["previous"]) == ("embedded/1", True, None)
    blue = psutil.Process(first.json["pid"])

    with traffic(workspace, first.json["url"]) as load:
        # Two at once: one refuses. Then the other is killed in the middle: blue serves on, green is left half started.
        second = begin(workspace, "rollout", NAME)
        known = place.read().tags()
        green = wait(lambda: {tag for _, tag in tagged(place.tag_prefix)} - known, "green is starting")
        refused = run(workspace, "rollout", NAME)
        assert refused.code == 1
        assert f"another rollout of it is under way (process {second.pid})" in refused.err
        second.send_signal(signal.SIGKILL)
        end(second)
        assert not gone([blue])
        assert {tag for _, tag in tagged(place.tag_prefix)} == known | green

        # Run again, it recovers and finishes.
        again = run(workspace, "rollout", NAME)
        assert again.code == 0, again.err
        assert "ending what an interrupted rollout left" in again.err
        assert (again.json["reference"], again.json["previous"]) == ("embedded/2", "embedded/1")
        assert again.json["canary"]["dtype"] == "float32"  # as the server before it
        assert again.json["canary"]["worst"]["error"] <= 1e-3
        assert again.json["canary"]["greedy_match"] == 1.0
        assert again.json["cut_off"] == 0
        assert again.json["url"] == first.json["url"]
        assert green & {tag for _, tag in tagged(place.tag_prefix)} == set()
        assert gone([blue])
        done = len(load.answered)
        wait(lambda: len(load.answered) >= done + 4, "requests go on")
        assert set(load.answered[done + 2 :]) == {"embedded/2"}
    assert load.failures == []
    assert (load.answered[0], load.answered[-1]) == ("embedded/1", "embedded/2")


def test_what_fails_changes_nothing_and_a_rollback_goes_back_under_load(workspace: Path) -> None:
    place = Place(workspace, NAME)
    served = run(workspace, "rollout", NAME, *SERVED)  # which the test before this one has done already
    assert served.code == 0, served.err
    assert served.json["reference"] == "embedded/2"
    with traffic(workspace, served.json["url"]) as load:
        # A server for which there is not enough memory: what serves goes on, and the exit code says so.
        failed = run(workspace, "rollout", f"{NAME}/1", options=[*SMALL[:3], "--kv-cache-memory-bytes", str(1 << 50)])
        assert failed.code == 2
        assert failed.out == ""
        assert re.search(r"embedded: vLLM ended with exit status 1; its last lines: .*Error", failed.err)
        assert "embedded/2 goes on serving" in failed.err
        assert rollout.status(NAME, workspace)["current"]["pid"] == served.json["pid"]
        assert {tag for _, tag in tagged(place.tag_prefix)} == place.read().tags()

        # Back to the version before: the alias moves once it serves.
        assert production(workspace) == 2
        back = run(workspace, "rollback", NAME)
        assert back.code == 0, back.err
        assert (back.json["reference"], back.json["previous"]) == ("embedded/1", "embedded/2")
        assert production(workspace) == 1
        done = len(load.answered)
        wait(lambda: len(load.answered) >= done + 4, "requests go on")
    assert load.failures == []
    assert (load.answered[0], load.answered[-1]) == ("embedded/2", "embedded/1")

    # Servers and router outlive the command; --stop ends them.
    status = run(workspace, "rollout", NAME, "--status")
    assert (status.code, status.json["serving"]) == (0, True)
    nothing_before = run(workspace, "rollback", NAME)
    assert nothing_before.code == 2
    assert "no version was in production before embedded/1" in nothing_before.err
    assert run(workspace, "rollout", NAME, "--stop").json["stopped"] == ["embedded/1"]
    assert [tag for _, tag in tagged(place.tag_prefix)] == []
    assert run(workspace, "rollout", NAME, "--status").code == 1
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{served.json['url']}/health")
    assert os.path.exists(status.json["current"]["log"])
